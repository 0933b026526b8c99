const make = (name, className, text = "") => el(name, { class: className }, text);
const { header, passes, end } = JSON.parse(byId("trace").textContent);
const start = header.prompt_tokens.length;
const special = new Set(header.special_tokens || []);
const pieces = end && end.pieces || null;
const stop = end ? start + end.stats.committed_tokens : Infinity;
const shown = text => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const label = text => shown(text).trim() || "\u2423";

// What each position becomes, and what stands after each number of passes; 0 is before the first.
const places = [];
const moments = [{ forward: 0, forwards: {}, tokens: 0, placed: 0, drafted: 0, kept: 0, guesses: new Map(), end: start, fresh: 0 }];
let hasGuesses = false, hasDrafts = false, hasConfidence = false;
passes.forEach((events, index) => {
  const moment = { ...moments.at(-1), drafts: [], fresh: 0, guessed: 0, revised: 0 };
  for (const event of events) {
    moment.forward = event.forward;
    moment.forwards = event.forwards || {};
    moment.end = Math.max(moment.end, event.canvas_end || 0);
    const confidence = event.confidence || [];
    hasConfidence ||= event.type !== "draft" && confidence.some(one => one !== null);
    const revised = new Set(event.revised || []);
    if (event.type === "draft") {
      hasDrafts = true;
      moment.drafts.push(event);
      moment.drafted += event.tokens.length;
      moment.kept += event.kept.length;
    } else if (event.type === "guess") {
      hasGuesses = true;
      moment.guesses = new Map(event.positions.map((position, at) => [position, {
        text: event.texts[at], token: event.tokens[at], confidence: confidence[at] ?? null,
        pass: index + 1, forward: event.forward, revised: revised.has(at),
      }]));
      moment.guessed = event.tokens.length;
      moment.revised = revised.size;
    } else {
      event.positions.forEach((position, at) => {
        places[position - start] = {
          pass: index + 1, token: event.tokens[at], text: event.texts[at],
          confidence: confidence[at] ?? null, forward: event.forward, revised: revised.has(at),
        };
        moment.end = Math.max(moment.end, position + 1);
        moment.placed += 1;
        if (position < stop) moment.tokens += 1, moment.fresh += 1;
      });
    }
  }
  moments.push(moment);
});
const last = moments.length - 1;
const numPositions = Math.max(...moments.map(moment => moment.end)) - start;

// The canvas has an element for each position; only what changes is touched.
const canvas = byId("canvas");
const cells = Array.from({ length: numPositions }, (_, at) => {
  const cell = make("span", "tok");
  cell.dataset.at = at;
  cell.hidden = true;
  return canvas.appendChild(cell);
});
const drawn = new Array(numPositions);

function look(at, now) {
  const position = at + start, moment = moments[now], place = places[at];
  if (place && place.pass <= now) {
    // A character that is spread over tokens stands with the last of them.
    const isText = position < stop && !special.has(place.token);
    const text = isText ? (pieces ? pieces[at] : place.text) : "";
    const classes = isText ? ["tok"] : ["tok", "name"];
    let background = "";
    if (isText && colour.value === "pass") classes.push(`pass${place.pass % 6}`);
    if (position >= stop) classes.push("beyond");
    if (isText && colour.value === "confidence" && place.confidence !== null) {
      background = `color-mix(in oklab, var(--low), var(--high) ${(100 * place.confidence).toFixed(0)}%)`;
    }
    if (place.pass === now) classes.push("new");
    if (text.includes("\n")) classes.push("break");
    const isFirst = at === 0 && !pieces;
    return { classes: classes.join(" "), text: isFirst ? text.replace(/^ /, "") : text, name: isText ? null : place.text, background };
  }
  const guess = moment.guesses.get(position);
  if (guess) return { classes: guess.revised ? "tok guess revised" : "tok guess", text: "", name: shown(guess.text), background: "" };
  if (position < moment.end) return { classes: position < stop ? "tok mask" : "tok mask beyond", text: "", name: null, background: "" };
  return { classes: "tok", text: "", name: null, background: "", hidden: true };
}

function draw(now) {
  cells.forEach((cell, at) => {
    const state = look(at, now), key = Object.values(state).join("|");
    if (key === drawn[at]) return;
    drawn[at] = key;
    cell.hidden = Boolean(state.hidden);
    cell.className = state.classes;
    cell.textContent = state.text;
    cell.style.background = state.background;
    if (state.name === null) delete cell.dataset.name;
    else cell.dataset.name = state.name;
  });
}

// A draft is a tree from left to right; the first child of a node stands beside it, the others below.
function drawDraft(draft) {
  const parents = draft.parents || draft.tokens.map((_, at) => at - 1);
  const children = new Map([[-1, []]]);
  parents.forEach((parent, at) => { children.set(at, []); children.get(parent).push(at); });
  const tree = make("div", "tree"), kept = new Set(draft.kept), row = new Map(), depth = new Map([[-1, 0]]);
  // Kept nodes first, so that the accepted path is the first line.
  for (const below of children.values()) below.sort((one, other) => kept.has(other) - kept.has(one) || one - other);
  let numRows = 0;
  const todo = [-1];
  while (todo.length) {
    const node = todo.pop();
    const isFirst = node >= 0 && children.get(parents[node])[0] === node;
    row.set(node, node === -1 ? ++numRows : isFirst ? row.get(parents[node]) : ++numRows);
    if (node >= 0) depth.set(node, depth.get(parents[node]) + 1);
    todo.push(...children.get(node).toReversed());
  }
  const place = (element, column, from, to) => {
    element.style.gridColumn = column;
    element.style.gridRow = `${from} / ${to + 1}`;
    tree.append(element);
  };
  const before = places[draft.positions[0] - start - 1];
  place(make("span", "node root", before ? label(before.text) : "prompt"), 1, 1, 1);
  draft.tokens.forEach((token, at) => {
    const node = make("span", kept.has(at) ? "node kept" : "node rejected", label(draft.texts[at]));
    node.dataset.tip = [
      `${kept.has(at) ? "kept" : "rejected"} draft ${JSON.stringify(draft.texts[at])}`,
      `token ${token}, position ${draft.positions[at]}`,
      ...said(draft.confidence ? draft.confidence[at] : null, "drafter's confidence"),
    ].join("\n");
    place(node, 2 * depth.get(at) + 1, row.get(at), row.get(at));
    place(make("span", "edge"), 2 * depth.get(at), row.get(parents[at]), row.get(at));
  });
  tree.style.gridTemplateColumns = `auto repeat(${Math.max(...depth.values())}, 1rem auto)`;
  return tree;
}

const passOf = one => [`forward pass ${one.forward}`, ...Object.entries(moments[one.pass].forwards).map(
  ([name, number]) => `${name} pass ${number}`)].join(", ");
const said = (confidence, name = "confidence") => confidence === null ? [] : [`${name} ${confidence.toFixed(3)}`];
const plural = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

function count(now) {
  const moment = moments[now];
  const rows = [
    ["Forward pass", `${moment.forward}`],
    ...Object.entries(moment.forwards).map(([name, number]) => [`${name} passes`, `${number}`]),
    ["Tokens", `${moment.tokens}`],
    ["Tokens / forward", moment.forward ? (moment.tokens / moment.forward).toFixed(2) : "-"],
  ];
  if (hasDrafts) rows.push(["Drafts kept", `${moment.kept} of ${moment.drafted}`]);
  rows.push(["New", `${moment.fresh}`]);
  if (hasGuesses) rows.push(["Guessed", `${moment.guesses.size}`], ["Revised", `${moment.revised || 0}`]);
  byId("counters").replaceChildren(...rows.map(([name, value]) => {
    const item = document.createElement("div");
    item.append(make("dt", "", name), make("dd", "", value));
    return item;
  }));
}

// Bars of the tokens that each pass committed.
const most = Math.max(1, ...moments.map(moment => moment.fresh));
function bars(until) {
  return moments.slice(1, until + 1).map(({ fresh }, at) => fresh
    ? `M${at + .1} ${most}v${-fresh}h.8v${fresh}z` : `M${at + .1} ${most}v${-most / 40}h.8v${most / 40}z`).join("");
}
byId("timeline").setAttribute("viewBox", `0 0 ${Math.max(1, last)} ${most}`);
byId("all").setAttribute("d", bars(last));

const hasMasks = moments.some(moment => moment.end - start > moment.placed + moment.guesses.size);
function explain() {
  byId("legend").textContent = [
    colour.value === "pass" ? "A background tells forward passes apart." : "Green is sure, red is not.",
    "An outline is new.",
    hasDrafts ? "Rejected drafts are struck out." : "",
    hasGuesses ? "Guesses are slanted and may still change." : "",
    hasMasks ? "Dots are positions not decided yet." : "",
    "Point at a token for its id, position, pass and confidence.",
  ].filter(Boolean).join(" ");
}

const scrub = byId("scrub"), colour = byId("colour"), speed = byId("speed");
let at = -1, timer = null;
scrub.max = last;

function show(now) {
  now = Math.min(last, Math.max(0, now));
  byId("tip").hidden = true;
  draw(now);
  count(now);
  if (now === at) return;
  at = now;
  scrub.value = now;
  scrub.setAttribute("aria-valuetext", `pass ${now} of ${last}`);
  byId("past").setAttribute("d", bars(now));
  const drafts = moments[now].drafts || [];
  byId("draft").replaceChildren(...drafts.map(drawDraft));
  byId("draft-title").textContent = drafts.length
    ? drafts.map(draft => `Draft of ${plural(draft.tokens.length, "token")}${draft.parents ? " in a tree" : ""}, ${draft.kept.length} kept`).join("; ")
    : "No draft in this pass";
  byId("ending").textContent = now < last ? "" : end
    ? `Ended: ${end.finish_reason}. ${plural(end.stats.committed_tokens, "token")} in ${plural(end.stats.forwards, "forward pass", "forward passes")}.`
    : "The trace has no end: the run was cut short.";
  for (const id of ["first", "back"]) byId(id).disabled = now === 0;
  for (const id of ["next", "last"]) byId(id).disabled = now === last;
}

function play(isOn) {
  clearTimeout(timer);
  timer = null;
  byId("play").setAttribute("aria-label", isOn ? "Pause" : "Play");
  byId("play").querySelector("path").setAttribute("d", isOn ? "M6 4h4v16H6zM14 4h4v16h-4z" : "M6 4v16l14-8z");
  if (!isOn) return;
  if (at === last) show(0);
  const tick = () => {
    show(at + 1);
    if (at === last) play(false);
    else timer = setTimeout(tick, 1000 / speed.value);
  };
  timer = setTimeout(tick, 1000 / speed.value);
}
function go(now) { play(false); show(now); }

byId("play").onclick = () => play(timer === null);
byId("first").onclick = () => go(0);
byId("back").onclick = () => go(at - 1);
byId("next").onclick = () => go(at + 1);
byId("last").onclick = () => go(last);
scrub.oninput = () => go(Number(scrub.value));
colour.onchange = () => { explain(); show(at); };
byId("timeline").onclick = event => {
  const box = byId("timeline").getBoundingClientRect();
  go(1 + Math.floor((event.clientX - box.left) / box.width * last));
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const onButton = event.target.matches("button, summary"), onScroll = event.target.matches("[tabindex]");
  const actions = {
    ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), Home: () => go(0), End: () => go(last),
    "+": () => { speed.selectedIndex = Math.min(speed.length - 1, speed.selectedIndex + 1); },
    "-": () => { speed.selectedIndex = Math.max(0, speed.selectedIndex - 1); },
    ...onButton ? {} : { " ": () => play(timer === null) },
  };
  if (!Object.hasOwn(actions, event.key) || onScroll && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  actions[event.key]();
});

function tell(event) {
  const tip = byId("tip"), target = event.target.closest?.("[data-at], [data-tip]");
  if (!target) { tip.hidden = true; return; }
  let text = target.dataset.tip;
  if (!text) {
    const number = Number(target.dataset.at), place = places[number], isFinal = place && place.pass <= at;
    const one = isFinal ? place : moments[at].guesses.get(number + start);
    text = one ? [
      `${isFinal ? "" : "guess "}${JSON.stringify(one.text)}`,
      `token ${one.token}, position ${number + start}`,
      `${passOf(one)}${one.revised ? ", revised" : ""}`,
      ...said(one.confidence),
    ].join("\n") : `position ${number + start}, not decided`;
  }
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
}
document.addEventListener("pointerover", tell);
document.addEventListener("pointerdown", tell);
document.addEventListener("scroll", () => { byId("tip").hidden = true; }, true);

// What stays.
const others = Object.entries(header.models || {}).filter(([name]) => name !== "target").map(([name, model]) => `, ${name} ${model}`);
byId("title").textContent = `${header.decoder} on ${header.model}${others.join("")}`;
byId("about").textContent = [
  header.promise, plural(start, "prompt token"), plural(last, "step"), end ? null : "cut short",
].filter(Boolean).join(" \u00b7 ");
byId("drafting").hidden = !hasDrafts;
byId("draft").classList.toggle("flat", !moments.some(moment => moment.drafts?.some(draft => draft.parents)));
colour.querySelector("[value=confidence]").disabled = !hasConfidence;
const prompt = header.prompt_text ?? (typeof header.prompt === "string" ? header.prompt : JSON.stringify(header.prompt ?? ""));
byId("prompt").textContent = prompt;
byId("prompting").open = prompt.length < 400;
const facts = [...Object.entries(header.config || {}), ...Object.entries(end ? end.stats : {})];
byId("facts").replaceChildren(...facts.map(([name, value]) => {
  const row = document.createElement("tr");
  row.append(make("td", "", name), make("td", "", typeof value === "object" && value !== null ? JSON.stringify(value) : String(value)));
  return row;
}));
byId("made").textContent = header.version ? `Chordal ${header.version}` : "";
explain();
show(0);
