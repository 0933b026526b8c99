const { version, examples } = JSON.parse(document.getElementById("data").textContent);

// ---- Words --------------------------------------------------------------------------------------

const plural = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
const passes = (number) => plural(number, "forward pass", "forward passes");
const seconds = (s) => (s >= 10 ? `${s.toFixed(1)} s` : s >= 1 ? `${s.toFixed(2)} s` : `${(1000 * s).toFixed(0)} ms`);
const NONE = "\u2013"; // an en dash, where there is no figure

const ESCAPES = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
// All that shows nothing or turns the text around, but the joiners, which emoji are made with.
const UNSEEN = /[\p{Cc}\p{Co}\p{Cn}\p{Cs}\u2028\u2029]|(?![\u200c\u200d])\p{Cf}/u;
const escape = (unseen) => ESCAPES[unseen] ?? `\\u{${unseen.codePointAt(0).toString(16)}}`;
const visible = (text) => text.replace(new RegExp(UNSEEN, "gu"), escape);
const isName = (text) => /^<[|\uff5c]?[\w\u2581|\uff5c/.:-]+>$/u.test(text);
const label = (text) => (text.trim() === "" && text ? visible(text).replaceAll(" ", "\u2423") : visible(text));

// ---- The server ---------------------------------------------------------------------------------

let key = "";

/** What the server refused, in its own words. */
class Refusal extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message || `The server answered ${status} and did not say why.`);
    this.status = status;
    this.param = error?.param ?? null;
    this.retryAfter = retryAfter;
  }
}

async function ask(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Something before the server, a proxy perhaps, answered in its own way.
    error = { message: `The server answered ${response.status}: ${text.slice(0, 300) || response.statusText}` };
  }
  throw new Refusal(response.status, error, response.headers.get("Retry-After"));
}

/** Give the data of each server-sent event; what arrives may be cut anywhere. */
async function* serverEvents(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A carriage return at the cut may be half of a line's end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- What happened: the events of one text, to be looked at as they stood after any pass ----------

class History {
  /** @param size Cells of a canvas that is there from the start; 0 where the text grows. */
  constructor(size) {
    this.size = size;
    this.places = []; // by position: what was committed there
    this.drafts = new Map(); // by pass
    this.guesses = []; // {forward, places}, each in place of the one before
    this.times = new Map(); // by pass: seconds after the request when it was first heard of
    this.forward = 0;
    this.end = size;
    this.text = "";
    this.counts = null; // the server's, at the end
    this.usage = null;
    this.reason = null;
    this.decoder = this.promise = null;
    this.first = null; // seconds to the first token
    this.elapsed = 0;
  }

  add(event, at) {
    const { kind, forward, positions, tokens, texts, confidence } = event;
    const one = (index) => ({
      forward, token: tokens[index], text: texts[index] ?? "", confidence: confidence?.[index] ?? null,
    });
    this.forward = Math.max(this.forward, forward);
    if (!this.times.has(forward)) this.times.set(forward, at);
    if (kind === "draft") {
      if (!this.drafts.has(forward)) this.drafts.set(forward, []);
      this.drafts.get(forward).push(new Draft(event));
    } else if (kind === "guess") {
      this.guesses.push({ forward, places: new Map(positions.map((position, index) => [position, one(index)])) });
      this.end = Math.max(this.end, ...positions.map((position) => position + 1));
    } else if (kind === "commit") {
      this.first ??= at;
      const kept = new Set(
        (this.drafts.get(forward) ?? []).flatMap((draft) => draft.keptPlaces),
      );
      positions.forEach((position, index) => {
        const place = one(index);
        place.kept = kept.has(`${position} ${place.token}`);
        this.places[position] = place;
        this.end = Math.max(this.end, position + 1);
      });
    }
  }

  /** Positions of the result; what is committed behind them is not part of it. */
  get stop() {
    return this.counts?.committed_tokens ?? Infinity;
  }

  /** Tokens of the result that each pass committed. */
  get heights() {
    const heights = new Array(this.forward + 1).fill(0);
    this.places.forEach((place, position) => { heights[place.forward] += position < this.stop; });
    return heights;
  }

  guessesAt(now) {
    let last = null;
    for (const guess of this.guesses) if (guess.forward <= now) last = guess;
    return last?.places ?? new Map();
  }

  /** Count what stood after a pass; at the end it is the server's own count. */
  countsAt(now, isEnd) {
    if (isEnd && this.counts) {
      const { forwards, committed_tokens, tokens_per_forward, draft_tokens, accepted_tokens } = this.counts;
      return { forwards, tokens: committed_tokens, perForward: tokens_per_forward, drafted: draft_tokens, kept: accepted_tokens };
    }
    let tokens = 0, drafted = 0, kept = 0;
    this.places.forEach((place, position) => { tokens += place.forward <= now && position < this.stop; });
    for (const [forward, drafts] of this.drafts) {
      if (forward > now) continue;
      for (const draft of drafts) drafted += draft.size, kept += draft.kept.size;
    }
    return { forwards: now, tokens, perForward: now ? tokens / now : null, drafted, kept };
  }
}

/** A draft; of a tree, its best path: down the kept tokens, then on along the first children. */
class Draft {
  constructor({ forward, positions, tokens, texts, confidence, kept, parents }) {
    Object.assign(this, { forward, positions, tokens, texts, confidence });
    this.size = tokens.length;
    this.kept = new Set(kept ?? []);
    const children = new Map();
    tokens.forEach((_, node) => {
      const parent = parents ? parents[node] : node - 1;
      if (!children.has(parent)) children.set(parent, []);
      children.get(parent).push(node);
    });
    this.path = [];
    for (let below = children.get(-1); below; below = children.get(this.path.at(-1)))
      this.path.push(below.find((node) => this.kept.has(node)) ?? below[0]);
    const onPath = new Set(this.path);
    this.others = tokens.map((_, node) => node).filter((node) => !onPath.has(node));
  }

  get keptPlaces() {
    return [...this.kept].map((node) => `${this.positions[node]} ${this.tokens[node]}`);
  }

  tell(node) {
    return [
      `${JSON.stringify(this.texts[node])}`,
      `drafted for forward pass ${this.forward}, ${this.kept.has(node) ? "kept" : "rejected"}`,
      ...sure(this.confidence?.[node] ?? null, "drafter's confidence"),
      `id ${this.tokens[node]}, position ${this.positions[node]}`,
    ];
  }
}
const sure = (confidence, name = "confidence") => (confidence === null ? [] : [`${name} ${confidence.toFixed(3)}`]);

// ---- Fields: what is left empty is not sent --------------------------------------------------------

/** Say what a setting takes: its choices, and any value of the types that none of them has. */
function kindOf({ type, choices }) {
  const types = new Set(type.split("|"));
  const isNone = types.delete("null");
  const isBool = types.delete("boolean");
  for (const choice of choices ?? []) types.delete(typeof choice === "number" ? "integer" : typeof choice);
  return {
    isNone,
    isWhole: types.has("integer"),
    isNumber: types.has("number"),
    isText: types.has("string"),
    isList: types.has("array"),
    isChoice: types.size === 0,
    choices: [...(isBool ? [true, false] : []), ...(choices ?? [])],
  };
}

/** Read a field's text as its kind; throws what is wrong with it. */
function read(text, kind) {
  const plain = text.trim();
  const choice = kind.choices.find((one) => said(one) === plain);
  if (choice !== undefined) return choice;
  if (kind.isNone && plain === "none") return null;
  if (kind.isList)
    return text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  const number = Number(plain);
  if (kind.isWhole && Number.isInteger(number)) return number;
  if (kind.isNumber && !Number.isNaN(number)) return number;
  if (kind.isText) return plain;
  const wanted = [kind.isNumber ? "a number" : "a whole number", ...kind.choices.map(said), ...(kind.isNone ? ["none"] : [])];
  throw new Error(`This must be ${wanted.join(" or ")}; got ${plain}.`);
}

const said = (value) => (value === null || value === undefined ? "none" : value === true ? "yes" : value === false ? "no" : String(value));
let numFields = 0;

/** One labelled field: `value` gives what it holds, undefined where it is left as it is. */
class Field {
  constructor(name, setting, onChange) {
    const kind = kindOf(setting), id = `field${++numFields}`;
    const standard = "default" in setting ? said(setting.default) : setting.placeholder ?? "";
    Object.assign(this, { name, kind, standard });
    if (kind.isChoice) {
      const options = (this.options = [...kind.choices, ...(kind.isNone ? [null] : [])]);
      this.control = el("select", { id },
        el("option", { value: "" }, `${standard} (default)`),
        options.map((option, index) => [option, index]).filter(([option]) => option !== setting.default)
          .map(([option, index]) => el("option", { value: index }, said(option))));
    } else if (kind.isList) {
      this.control = el("textarea", { id, rows: 1, placeholder: standard, spellcheck: "false" });
    } else {
      const list = kind.choices.length ? el("datalist", { id: `${id}list` }, kind.choices.map((choice) => el("option", { value: said(choice) }))) : null;
      this.list = list;
      this.control = el("input", {
        id, type: "text", placeholder: standard, autocomplete: "off", spellcheck: "false",
        inputmode: (kind.isWhole || kind.isNumber) && !kind.isNone && !list ? "decimal" : null, list: list && `${id}list`,
      });
    }
    this.fault = el("p", { class: "fault", id: `${id}fault`, hidden: true });
    this.help = setting.help ? el("p", { class: "help", id: `${id}help` }, setting.help) : null;
    this.control.setAttribute("aria-describedby", this.help ? `${id}help ${id}fault` : `${id}fault`);
    this.element = el("div", { class: "field" }, el("label", { for: id }, name), this.control, this.list, this.fault, this.help);
    this.control.addEventListener("input", () => {
      show(this, null);
      this.mark();
      onChange();
    });
  }

  get isSet() {
    return this.control.value.trim() !== "";
  }

  get value() {
    if (!this.isSet) return undefined;
    return this.options ? this.options[this.control.value] : read(this.control.value, this.kind);
  }

  set text(text) {
    this.control.value = text;
    this.mark();
  }

  mark() {
    this.control.classList.toggle("set", this.isSet);
  }
}

/** Show a fault at a field, open what hides it; null takes it away. */
function show(field, message) {
  field.fault.textContent = message ?? "";
  field.fault.hidden = message === null;
  if (message === null) field.control.removeAttribute("aria-invalid");
  else {
    field.control.setAttribute("aria-invalid", "true");
    const hiding = field.control.closest("details");
    if (hiding) hiding.open = true;
  }
}

/** Read all fields; null if one of them is wrong, which is then shown at it. */
function values(fields) {
  const found = {};
  let isRight = true;
  for (const field of fields) {
    try {
      const value = field.value;
      if (value !== undefined) found[field.name] = value;
    } catch (error) {
      show(field, error.message);
      isRight = false;
    }
  }
  return isRight ? found : null;
}
const brief = (fields) => fields.filter((field) => field.isSet)
  .map((field) => `${field.name} ${field.options ? said(field.value) : visible(field.control.value)}`).join(", ");

const SAMPLING = [
  ["max_tokens", { type: "integer", help: "Most tokens; the canvas of a diffusion model." }],
  ["temperature", { type: "number", help: "0 takes the likeliest token." }],
  ["top_p", { type: "number", placeholder: "1" }],
  ["top_k", { type: "integer", placeholder: "all" }],
  ["min_p", { type: "number", placeholder: "0" }],
  ["seed", { type: "integer", placeholder: "any" }],
  ["presence_penalty", { type: "number", placeholder: "0" }],
  ["frequency_penalty", { type: "number", placeholder: "0" }],
  ["repetition_penalty", { type: "number", placeholder: "1" }],
  ["stop", { type: "array", placeholder: "one a line", help: "Up to 16 texts that end it; \\n is a new line." }],
];

// ---- A panel: one decoder and what it did --------------------------------------------------------------

const PLAIN = ["autoregressive", "low_confidence", "block_diffusion"];
const PARALLEL = ["prompt_lookup", "threshold", "freedave"];
const panels = [];
let models = [];
const decodersOf = new Map();

class Panel {
  /** @param preferred Decoders to begin with, where the model takes one of them. */
  constructor(preferred) {
    this.preferred = preferred;
    const root = byId("panel").content.cloneNode(true).firstElementChild;
    this.root = root;
    const at = (name) => root.querySelector(`.${name}`);
    for (const name of ["letter", "model", "decoder", "remove", "about", "settings", "counters", "canvas", "time", "bars",
      "line", "scrub", "moment", "legend", "drafts", "lane", "more", "plain", "facts", "copy"]) this[name] = at(name);
    this.problem = root.querySelector(":scope > .fault");
    this.picks = {};
    for (const name of ["model", "decoder"]) {
      const fault = el("p", { class: "fault", hidden: true, id: `fault${++numFields}` });
      this[name].setAttribute("aria-describedby", fault.id);
      this[name].closest(".field").append(fault);
      this.picks[name] = { name, control: this[name], fault };
    }
    this.fields = [];
    this.decoders = [];
    this.history = null;
    this.now = 0;
    this.cells = [];
    this.model.append(...models.map(({ id }) => el("option", { value: id }, id)));
    this.model.onchange = () => this.choose();
    this.decoder.onchange = () => this.build();
    this.remove.onclick = () => removePanel(this);
    this.scrub.oninput = () => {
      play(false);
      this.show(Number(this.scrub.value));
    };
    this.bars.onclick = ({ clientX }) => {
      const box = this.bars.getBoundingClientRect();
      play(false);
      this.show(1 + Math.floor(((clientX - box.left) / box.width) * this.history.forward));
    };
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    this.canvas.addEventListener("focusin", ({ target }) => this.hold(target));
    this.copy.hidden = !navigator.clipboard;
    this.copy.onclick = async () => {
      await navigator.clipboard.writeText(this.history.text);
      this.copy.textContent = "Copied";
      setTimeout(() => { this.copy.textContent = "Copy text"; }, 1500);
    };
    this.canvas.dataset.empty = "Run it to see which forward pass commits each token.";
    this.name();
    this.count();
  }

  /** Name the panel by its place; there is only one letter to see where there are two. */
  name() {
    const letter = "AB"[Math.max(0, panels.indexOf(this))] ?? "A";
    this.tag = letter;
    this.letter.textContent = letter;
    this.root.setAttribute("aria-label", panels.length > 1 ? `Decoder ${letter}` : "Decoder");
    this.remove.setAttribute("aria-label", `Remove decoder ${letter}`);
    this.canvas.setAttribute("aria-label", `Text of ${letter}, token by token`);
    this.scrub.setAttribute("aria-label", `Forward pass of ${letter}`);
    this.lane.setAttribute("aria-label", `Drafts of ${letter}`);
    this.plain.setAttribute("aria-label", `Plain text of ${letter}`);
  }

  /** Fetch the decoders of the model and offer them. */
  async choose() {
    const model = this.model.value;
    show(this.picks.model, null);
    try {
      if (!decodersOf.has(model))
        decodersOf.set(model, (await (await ask(`/v1/decoders?model=${encodeURIComponent(model)}`)).json()).data);
    } catch (error) {
      this.complain(error);
    }
    if (model !== this.model.value) return;
    const before = this.decoder.value;
    const standard = models.find(({ id }) => id === model)?.chordal?.default_decoder;
    this.decoders = decodersOf.get(model) ?? [];
    this.decoder.replaceChildren(
      el("option", { value: "" }, standard ? `server's choice: ${standard}` : "server's choice"),
      ...this.decoders.map(({ name }) => el("option", { value: name }, name)),
    );
    const names = this.decoders.map(({ name }) => name);
    // Who started the server with a decoder wants to see it; without one the plain decoder is its choice.
    const wanted = !standard || PLAIN.includes(standard) || this.preferred === PLAIN ? this.preferred : [];
    this.decoder.value = [before, ...wanted].find((name) => names.includes(name)) ?? "";
    this.build();
  }

  /** Make the fields of the decoder's settings. */
  build() {
    show(this.picks.decoder, null);
    const chosen = this.decoders.find(({ name }) => name === this.decoder.value);
    this.fields = (chosen?.settings ?? []).map((setting) => new Field(setting.name, setting, () => this.summarize()));
    this.settings.querySelector(".fields").replaceChildren(...this.fields.map((field) => field.element));
    this.settings.hidden = !this.fields.length;
    this.settings.open = false;
    this.summarize();
    this.describe(chosen);
  }

  summarize() {
    this.settings.querySelector(".changed").textContent = brief(this.fields);
  }

  describe(chosen, history = null) {
    const found = chosen ?? this.decoders.find(({ name }) => name === history?.decoder);
    const promise = history?.promise ?? found?.promise;
    this.about.textContent = [
      !chosen && history?.decoder,
      promise,
      promise !== "exact" && found?.exact_when && `exact when ${found.exact_when}`,
      found?.paper && found.paper !== "-" && found.paper,
    ].filter(Boolean).join(" \u00b7 ");
  }

  get isDiffusion() {
    const chosen = this.decoders.find(({ name }) => name === this.decoder.value) ?? this.decoders[0];
    return chosen?.family === "diffusion";
  }

  /** Give the request; null if a field is wrong. */
  request(sampling) {
    const settings = values(this.fields);
    if (settings === null) return null;
    const prompt = byId("prompt").value, isChat = byId("mode").value === "chat";
    const chordal = { counts: true, events: true };
    if (this.decoder.value) Object.assign(chordal, { decoder: this.decoder.value, settings });
    return {
      path: isChat ? "/v1/chat/completions" : "/v1/completions",
      body: {
        model: this.model.value,
        ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
        ...sampling, stream: true, stream_options: { include_usage: true }, chordal,
      },
    };
  }

  /** Run a request to its end, whichever that is. */
  async run({ path, body }) {
    this.clear();
    const history = (this.history = new History(this.isDiffusion ? body.max_tokens ?? 0 : 0));
    this.abort = new AbortController();
    this.isLive = true;
    const start = performance.now();
    const elapsed = () => (performance.now() - start) / 1000;
    this.clock = elapsed;
    let isWhole = false;
    this.redraw();
    try {
      const response = await ask(path, { body, signal: this.abort.signal });
      for await (const data of serverEvents(response.body)) {
        if (data === "[DONE]") {
          isWhole = true;
          break;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(200, chunk.error);
        this.take(chunk, elapsed());
      }
      if (!isWhole) throw new Error("The connection broke before the text was whole.");
    } catch (error) {
      if (error.name === "AbortError") history.reason = "stopped";
      else {
        history.reason = "failed";
        const isCut = error instanceof SyntaxError || error instanceof TypeError;
        this.complain(isCut ? new Error("The connection broke before the text was whole.") : error);
      }
    } finally {
      this.abort.abort();
      history.elapsed = history.counts?.wall_s ?? elapsed();
      this.isLive = false;
      this.redraw();
    }
  }

  take(chunk, at) {
    const { history } = this;
    if (chunk.usage) history.usage = chunk.usage;
    const choice = (chunk.choices ?? []).find(({ index }) => !index);
    if (!choice) return;
    const text = choice.delta?.content ?? choice.text ?? "";
    if (text) history.first ??= at;
    history.text += text;
    for (const event of choice.chordal?.events ?? []) history.add(event, at);
    history.counts = choice.chordal?.counts ?? history.counts;
    history.decoder = choice.chordal?.decoder ?? history.decoder;
    history.promise = choice.chordal?.promise ?? history.promise;
    history.reason = choice.finish_reason ?? history.reason;
    this.redraw();
  }

  /** Say what went wrong, at the field that the server names if there is one. */
  complain(error) {
    if (error.status === 401) askForKey(Boolean(key));
    const wait = error.retryAfter ? ` Try again in ${plural(Number(error.retryAfter), "second")}.` : "";
    const message = error.message + wait;
    const field = fieldOf(error.param, this);
    if (field) show(field, message);
    this.problem.textContent = field ? `Refused: see ${field.name}.` : message;
    this.problem.hidden = false;
  }

  clear() {
    this.problem.hidden = true;
    for (const field of [...this.fields, ...Object.values(this.picks)]) show(field, null);
    this.cells = [];
    this.canvas.replaceChildren();
    this.lane.replaceChildren();
    this.laneOf = new Map();
    this.now = 0;
    this.drawn = -1;
    this.more.open = false;
  }

  // -- Drawing

  /** Draw the newest state with the next frame. */
  redraw() {
    if (this.isAsked) return;
    this.isAsked = true;
    const draw = () => {
      this.isAsked = false;
      if (!this.history) return;
      this.show(this.history.forward);
      compare();
    };
    // A page that nobody sees gets no frames.
    if (document.hidden) setTimeout(draw, 200);
    else requestAnimationFrame(draw);
  }

  /** Show what stood after a pass; 0 is before the first. */
  show(now) {
    const { history } = this;
    this.now = now = Math.min(history.forward, Math.max(0, now));
    const isEnd = now === history.forward;
    this.root.style.setProperty("--n", Math.max(2, this.isLive ? Math.max(6, history.forward) : history.forward));
    this.draw(now);
    this.count(isEnd);
    this.drawTime(now);
    this.drawDrafts(now);
    this.explain();
    this.more.hidden = this.isLive || !(history.text || history.counts);
    if (!this.isLive && isEnd) {
      this.plain.textContent = history.text;
      this.facts.replaceChildren(...Object.entries({ ...history.counts, ...history.usage }).map(([name, value]) =>
        el("tr", {}, el("td", {}, name), el("td", {}, typeof value === "object" && value !== null ? JSON.stringify(value) : String(value)))));
      this.describe(this.decoders.find(({ name }) => name === this.decoder.value), history);
    }
    this.root.classList.toggle("live", this.isLive);
    this.drawn = now;
  }

  /** Say how the cell of a position looks after a pass. */
  look(position, now, guesses) {
    const { history } = this, place = history.places[position], isBeyond = position >= history.stop;
    if (place && place.forward <= now) {
      const classes = ["tok"];
      if (place.kept) classes.push("kept");
      if (isBeyond) classes.push("beyond");
      if (place.forward === now && this.drawn !== now) classes.push("new");
      return { ...place, classes };
    }
    const guess = guesses.get(position);
    if (guess) return { ...guess, classes: isBeyond ? ["tok", "guess", "beyond"] : ["tok", "guess"] };
    return { classes: isBeyond ? ["tok", "mask", "beyond"] : ["tok", "mask"], text: "", forward: null };
  }

  /** Draw the cells of the text; only what changed is touched. */
  draw(now) {
    const { history } = this, guesses = history.guessesAt(now);
    const looks = [];
    for (let position = 0; position < history.end; position++) {
      const look = this.look(position, now, guesses);
      if (look.forward !== null || history.size || guesses.size) looks.push(look);
    }
    // Where a text grows there is nothing behind its last token.
    while (!history.size && looks.length && looks.at(-1).forward === null) looks.pop();
    if (!history.size) {
      for (const draft of history.drafts.get(now) ?? [])
        for (const node of draft.path.filter((node) => !draft.kept.has(node)))
          looks.push({ classes: this.drawn === now ? ["tok", "ghost"] : ["tok", "ghost", "new"], text: draft.texts[node], forward: now, draft, node });
    }
    if (!history.places.length && history.text && !this.isLive) looks.push({ classes: ["tok"], text: history.text, forward: 1 });
    // Models fill the rest of a canvas with the token that ends the text: it is written once.
    let ending = null;
    for (const look of looks) {
      if (look.draft || !isName(look.text)) continue;
      look.classes.push("name");
      if (look.text === ending) look.classes.push("again");
      ending = look.text;
    }
    // The number of a pass stands where its tokens begin, if there is room since the one before.
    let last = null, room = Infinity;
    for (const look of looks) {
      const isToken = look.forward !== null && !look.draft && !look.classes.includes("guess");
      if (isToken && look.forward !== last && room > 0) {
        look.isHead = true;
        room = 2 - 8 * String(look.forward).length;
      }
      last = isToken ? look.forward : null;
      room += look.classes.includes("again") ? 16 : 9 * Math.max(1, look.text.length);
    }
    const focused = this.cells.findIndex((cell) => cell === document.activeElement);
    while (this.cells.length > looks.length) this.cells.pop().remove();
    looks.forEach((look, index) => {
      const isFirst = index === 0 && !/^\s/.test(history.text);
      if (isFirst) look.shown = look.text.replace(/^ /, "");
      const drawn = [look.classes.join(" "), look.forward, look.isHead, look.shown, look.text].join("|");
      let cell = this.cells[index];
      if (!cell) {
        cell = el("span", { role: "option", tabindex: "-1", "aria-selected": "false" });
        this.cells.push(cell);
        this.canvas.append(cell);
      }
      cell.look = look;
      if (cell.drawn === drawn) return;
      cell.drawn = drawn;
      cell.className = look.classes.join(" ");
      cell.dataset.forward = look.forward ?? "";
      if (look.forward !== null) cell.style.setProperty("--p", look.forward);
      write(cell, look);
      cell.setAttribute("aria-label", this.tell(look, index).join(", "));
    });
    if (focused >= this.cells.length) this.cells.at(-1)?.focus();
    if (this.cells.length && !this.cells.some((cell) => cell.tabIndex === 0)) this.cells[0].tabIndex = 0;
    this.canvas.setAttribute("aria-busy", String(this.isLive));
    this.canvas.dataset.empty = this.isLive ? "Waiting for the first forward pass." : now === 0 ? "Before the first forward pass." : "No text.";
  }

  tell(look, index) {
    if (look.draft) return look.draft.tell(look.node);
    if (look.forward === null) return [`position ${index}`, "not decided yet"];
    const isGuess = look.classes.includes("guess");
    return [
      JSON.stringify(look.text),
      isGuess ? `guess after forward pass ${look.forward}` : `forward pass ${look.forward}${look.kept ? ", drafted and kept" : ""}`,
      ...sure(look.confidence ?? null),
      ...(look.token === undefined ? [] : [`id ${look.token}, position ${index}`]),
      ...(look.classes.includes("beyond") ? ["behind the end of the text"] : []),
    ];
  }

  count(isEnd = false) {
    const { history } = this;
    const counts = history ? history.countsAt(this.now, isEnd && !this.isLive) : null;
    const isFinal = Boolean(isEnd && !this.isLive && history?.counts);
    const elapsed = this.isLive ? this.clock() : history?.elapsed;
    const rate = counts && isEnd && elapsed ? counts.tokens / elapsed : null;
    const rows = [
      ["tokens / forward", "per-forward", counts?.perForward ? counts.perForward.toFixed(2) : NONE],
      ["forward passes", "forwards", counts ? counts.forwards : NONE],
      ["tokens", "tokens", counts ? counts.tokens : NONE],
      ["tokens/s", "rate", rate === null ? NONE : rate >= 100 ? rate.toFixed(0) : rate.toFixed(1)],
      ["drafts kept", "drafted", counts?.drafted ? [`${counts.kept}`, el("small", {}, ` of ${counts.drafted}`)] : NONE],
      ["first token", "first", history?.first ? [(1000 * history.first).toFixed(0), el("small", {}, " ms")] : NONE],
    ];
    this.counters.dataset.from = isFinal ? "server" : "page";
    this.counters.replaceChildren(...rows.map(([name, id, value]) =>
      el("div", { class: id === "per-forward" ? "lead" : null, "data-count": id }, el("dt", {}, name), el("dd", {}, value))));
  }

  /** Draw a bar for each pass, as high as the tokens that it committed. */
  drawTime(now) {
    const { history } = this, last = history.forward;
    this.time.hidden = last === 0;
    if (!last) return;
    const heights = history.heights;
    // One scale for both panels, on which a token a pass is low.
    const most = Math.max(4, ...panels.flatMap((panel) => panel.history?.heights ?? []));
    const key = `${heights} ${most}`;
    if (this.bars.key !== key) {
      this.bars.key = key;
      this.bars.setAttribute("viewBox", `0 0 ${last} ${most}`);
      this.bars.replaceChildren(...heights.slice(1).map((height, index) => svg("rect", {
        x: index + 0.06, width: 0.88, y: most - Math.max(height, most / 30), height: Math.max(height, most / 30), style: { "--p": index + 1 },
      })));
    }
    [...this.bars.children].forEach((bar, index) => {
      bar.setAttribute("class", `bar${heights[index + 1] ? "" : " none"}${index + 1 > now ? " later" : ""}`);
    });
    this.scrub.max = last;
    this.scrub.value = now;
    const fresh = heights[now] ?? 0;
    this.moment.textContent = now
      ? `Forward pass ${now} of ${last}${this.isLive ? " so far" : ""}: ${plural(fresh, "token")} committed.`
      : `Before the first of ${passes(last)}.`;
    this.scrub.setAttribute("aria-valuetext", this.moment.textContent);
    this.line.style.maxWidth = `max(9rem, ${last * 2.4}rem)`;
  }

  drawDrafts(now) {
    const { history } = this;
    this.drafts.hidden = !history.drafts.size;
    if (!history.drafts.size) return;
    let drafted = 0, kept = 0;
    const isDown = this.lane.scrollTop + this.lane.clientHeight >= this.lane.scrollHeight - 4;
    for (const [forward, drafts] of history.drafts) {
      if (!this.laneOf.has(forward)) this.laneOf.set(forward, []);
      const rows = this.laneOf.get(forward);
      for (const draft of drafts.slice(rows.length)) {
        rows.push(draftRow(draft));
        this.lane.append(rows.at(-1));
      }
      for (const row of rows) {
        row.classList.toggle("now", forward === now);
        row.classList.toggle("later", forward > now);
      }
      for (const draft of drafts) if (forward <= now) drafted += draft.size, kept += draft.kept.size;
    }
    const shown = this.laneOf.get(now)?.at(-1);
    if (this.isLive && isDown) this.lane.scrollTop = this.lane.scrollHeight;
    else if (shown && this.drawn !== now) this.lane.scrollTop = shown.offsetTop - this.lane.clientHeight / 2;
    this.drafts.querySelector("h3").textContent = `Drafts kept: ${kept} of ${drafted}, ${drafted - kept} rejected`;
  }

  explain() {
    const { history } = this, last = history.forward;
    const key = [last, history.drafts.size > 0, history.guesses.length > 0, history.size > 0].join();
    if (this.legend.key === key) return;
    this.legend.key = key;
    const steps = Math.min(last, 9);
    const at = (step) => (steps > 1 ? 1 + Math.round((step * (last - 1)) / (steps - 1)) : 1);
    const item = (className, sample, text) => el("span", { class: "item" }, el("span", { class: `tok ${className}`, style: { "--p": 1 } }, sample), ` ${text}`);
    this.legend.replaceChildren(...(last ? [
      el("span", { class: "item" }, "forward pass 1",
        el("span", { class: "ramp" }, Array.from({ length: steps }, (_, step) => el("span", { class: "pass", style: { "--p": at(step) } }))),
        last > 1 ? `${last}` : ""),
      history.drafts.size ? item("kept", "abc", "draft kept") : null,
      history.drafts.size && !history.size ? item("ghost", "abc", "draft rejected") : null,
      history.guesses.length ? item("guess", "abc", "guess, may change") : null,
      history.size ? item("mask", "", "not decided") : null,
    ].filter(Boolean) : []));
  }

  // -- Looking at one token

  /** Make the focused token the one that Tab comes back to. */
  hold(cell) {
    for (const other of this.cells) {
      other.tabIndex = other === cell ? 0 : -1;
      other.setAttribute("aria-selected", String(other === cell));
    }
  }

  walk(event) {
    const from = this.cells.indexOf(document.activeElement);
    if (from < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = {
      ArrowLeft: () => from - 1, ArrowRight: () => from + 1, Home: () => 0, End: () => this.cells.length - 1,
      ArrowUp: () => this.beside(from, -1), ArrowDown: () => this.beside(from, 1),
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    this.cells[Math.min(this.cells.length - 1, Math.max(0, to))].focus();
  }

  /** Find the token above or below, nearest by its left edge. */
  beside(from, way) {
    const boxes = this.cells.map((cell) => cell.getClientRects()[0] ?? cell.getBoundingClientRect());
    const here = boxes[from], isThere = (box) => way * (box.top - here.top) > here.height / 2;
    const tops = boxes.filter(isThere).map((box) => way * box.top);
    if (!tops.length) return from;
    const line = Math.min(...tops);
    const far = (index) => (isThere(boxes[index]) && Math.abs(way * boxes[index].top - line) < here.height / 2
      ? Math.abs(boxes[index].left - here.left) : Infinity);
    return boxes.reduce((best, _, index) => (far(index) < far(best) ? index : best), boxes.findIndex((box) => isThere(box)));
  }
}

/** Write a token so that all of it can be seen: what is not text is written by the style. */
function write(cell, { text, shown, classes, forward, isHead, draft }) {
  cell.replaceChildren();
  if (isHead) cell.append(el("i", { class: "number", "data-name": forward }));
  if (classes.includes("name")) {
    if (!classes.includes("again")) cell.append(el("i", { "data-name": text }));
    return;
  }
  let plain = "";
  const flush = () => { if (plain) cell.append(plain); plain = ""; };
  for (const character of shown ?? text) {
    if (!UNSEEN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    cell.append(el("i", { "data-name": escape(character) }));
    if (character === "\n" && !draft) plain = "\n";
  }
  flush();
}

/** A line of the drafts: the best path, then how many tokens of other branches there were. */
function draftRow(draft) {
  const chips = draft.path.map((node) => {
    const chip = el("span", { class: `chip ${draft.kept.has(node) ? "kept" : "rejected"}`, style: { "--p": draft.forward } }, label(draft.texts[node]));
    chip.tell = () => draft.tell(node);
    return chip;
  });
  if (draft.others.length) {
    const rest = el("span", { class: "chip rest" }, `+${draft.others.length} on other branches`);
    const names = draft.others.slice(0, 24).map((node) => label(draft.texts[node]).trim()).join(", ");
    rest.tell = () => [`Rejected: ${names}${draft.others.length > 24 ? ", ..." : ""}`];
    chips.push(rest);
  }
  return el("li", {},
    el("span", { class: "count" }, `pass ${draft.forward}: ${draft.kept.size} of ${draft.size}`),
    el("span", { class: "path" }, chips));
}

// ---- Both panels: run, stop, compare, play again ------------------------------------------------------------

let samplingFields = [];
const promptField = { name: "prompt", control: byId("prompt"), fault: el("p", { class: "fault", id: "promptfault", hidden: true }) };

/** Find the field that the server's `param` names, e.g. chordal.settings.threshold or messages[0].content. */
function fieldOf(param, panel) {
  if (!param) return null;
  const parts = String(param).split(/[.[\]]+/).filter((part) => part && part !== "chordal" && part !== "body");
  if (["prompt", "messages"].includes(parts[0])) return promptField;
  const named = (fields) => fields.find((field) => parts.includes(field.name));
  const own = [...panel.fields, ...Object.values(panel.picks)];
  return parts.includes("settings") ? named(panel.fields) ?? null
    : named(samplingFields) ?? named(own) ?? (parts[0] === "max_completion_tokens" ? samplingFields[0] : null);
}

const isRunning = () => panels.some((panel) => panel.isLive);
const say = (text) => { byId("status").textContent = text; };

async function run() {
  if (isRunning() || byId("run").disabled) return;
  play(false);
  show(promptField, null);
  for (const field of samplingFields) show(field, null);
  const sampling = values(samplingFields);
  const requests = panels.map((panel) => panel.request(sampling ?? {}));
  if (sampling === null || requests.includes(null)) {
    say("Not sent: see the fields in red.");
    document.querySelector("[aria-invalid]")?.focus();
    return;
  }
  byId("keying").hidden = true;
  say("Running.");
  const running = panels.map((panel, index) => panel.run(requests[index]));
  ready();
  await Promise.all(running);
  ready();
  compare();
  say(panels.map((panel) => `${panels.length > 1 ? `${panel.tag}: ` : ""}${ending(panel)}`).join(" "));
}

function ending({ history }) {
  const counts = history.countsAt(history.forward, true);
  const done = `${plural(counts.tokens, "token")} in ${passes(counts.forwards)}`;
  const why = { stop: "Done", length: "Ended at max_tokens", stopped: "Stopped", failed: "Failed" };
  return `${why[history.reason] ?? `Ended: ${history.reason}`}: ${done}, ${seconds(history.elapsed)}.`;
}

function stop() {
  play(false);
  for (const panel of panels) panel.abort?.abort();
}

function ready() {
  const isOn = isRunning();
  const focused = document.activeElement;
  byId("run").disabled = isOn || !models.length;
  byId("stop").disabled = !isOn;
  // A control that is turned off loses the focus, which would be nowhere then.
  if (focused?.disabled && isOn) byId("stop").focus();
  else if (focused === byId("stop") && !isOn) byId("run").focus();
  byId("compare").disabled = isOn || !models.length;
  byId("compare").hidden = panels.length > 1;
  byId("playing").hidden = isOn || !panels.some((panel) => panel.history?.forward);
  for (const panel of panels) {
    panel.remove.disabled = isOn;
  }
}

/** Say in one line how two decoders compare. */
function compare() {
  const line = byId("comparison");
  const [one, other] = panels.map((panel) => panel.history);
  line.hidden = !(one?.places.length && other?.places.length);
  if (line.hidden) return;
  const isDone = !isRunning();
  const [a, b] = [one, other].map((history) => history.countsAt(history.forward, isDone));
  const ratio = (big, small) => (small && big / small >= 1.05 ? ` (${(big / small).toFixed(1)}x)` : "");
  const least = (x, y) => (x >= y ? ratio(x, y) : ratio(y, x));
  const parts = [
    el("b", {}, `A ${a.perForward?.toFixed(2) ?? NONE}, B ${b.perForward?.toFixed(2) ?? NONE}`), " tokens per forward", least(a.perForward, b.perForward),
  ];
  if (isDone) {
    parts.push(" \u00b7 ", el("b", {}, `A ${seconds(one.elapsed)}, B ${seconds(other.elapsed)}`), least(one.elapsed, other.elapsed));
    const areWhole = [one, other].every((history) => ["stop", "length"].includes(history.reason));
    if (areWhole) {
      const isSame = one.text === other.text;
      const [x, y] = [[...one.text], [...other.text]];
      const at = x.findIndex((character, index) => character !== y[index]);
      parts.push(" \u00b7 ", el("b", {}, isSame ? "same text" : `texts differ from character ${(at < 0 ? x.length : at) + 1}`));
    }
  }
  line.replaceChildren(...parts);
}

let timer = null;
function play(isOn) {
  clearTimeout(timer);
  timer = null;
  byId("play").textContent = isOn ? "Pause" : "Play again";
  if (!isOn) return;
  const shown = panels.filter((panel) => panel.history?.forward);
  if (shown.every((panel) => panel.now === panel.history.forward)) for (const panel of shown) panel.show(0);
  // As it came: by the seconds at which each pass was heard of, from the pass that is shown on.
  const timeOf = (panel, forward) => {
    let time = 0;
    for (const [pass, at] of panel.history.times) if (pass <= forward) time = Math.max(time, at);
    return time;
  };
  const begin = performance.now() - 1000 * Math.max(0, ...shown.map((panel) => timeOf(panel, panel.now)));
  const tick = () => {
    const speed = Number(byId("speed").value), at = (performance.now() - begin) / 1000;
    for (const panel of shown) {
      let to = panel.now + 1;
      if (!speed) {
        to = panel.now;
        while (to < panel.history.forward && timeOf(panel, to + 1) <= at) to += 1;
      }
      if (to !== panel.now && panel.now < panel.history.forward) panel.show(to);
    }
    if (shown.every((panel) => panel.now === panel.history.forward)) play(false);
    else timer = setTimeout(tick, speed ? 1000 / speed : 16);
  };
  const speed = Number(byId("speed").value);
  timer = setTimeout(tick, speed ? 1000 / speed : 16);
}

async function addPanel(preferred) {
  const panel = new Panel(preferred);
  panels.push(panel);
  byId("panels").append(panel.root);
  for (const one of panels) one.name();
  panel.model.value = panels[0].model.value;
  ready();
  await panel.choose();
  return panel;
}

function removePanel(panel) {
  panels.splice(panels.indexOf(panel), 1);
  panel.root.remove();
  for (const one of panels) one.name();
  compare();
  ready();
  byId("compare").focus();
}

// ---- The page ---------------------------------------------------------------------------------------

function askForKey(wasWrong) {
  byId("keying").hidden = false;
  byId("keying").querySelector("p").textContent = wasWrong
    ? "The server does not take this key."
    : "The server asks for a key. It is kept in this page only, and gone when it is closed.";
  byId("key").focus();
}

function trouble(message) {
  byId("trouble").hidden = message === null;
  byId("trouble").querySelector("p").textContent = message ?? "";
}

/** Ask the server what it has, again while it is still loading. */
async function connect() {
  clearTimeout(connect.timer);
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    byId("server").textContent = "not connected";
    if (error.status === 401) askForKey(Boolean(key));
    else {
      trouble(error.message);
      if (error.status === 503) connect.timer = setTimeout(connect, 2000);
    }
    return;
  }
  trouble(null);
  byId("keying").hidden = true;
  byId("server").textContent = `${location.host} \u00b7 ${models.length > 3 ? plural(models.length, "model") : models.map(({ id }) => id).join(", ")}`;
  if (models[0]?.chordal?.has_chat_template === false) byId("mode").value = "plain";
  if (panels.length) for (const panel of panels) await panel.choose();
  else await addPanel(PARALLEL);
  ready();
}

byId("prompt").closest(".field").append(promptField.fault);
byId("prompt").setAttribute("aria-describedby", "promptfault");
samplingFields = SAMPLING.map(([name, setting]) => new Field(name, setting, summarizeSampling));
byId("sampling").querySelector(".fields").replaceChildren(...samplingFields.map((field) => field.element));
function summarizeSampling() {
  byId("sampling").querySelector(".changed").textContent = brief(samplingFields);
}
const sampled = (name) => samplingFields.find((field) => field.name === name);
sampled("temperature").text = "0";

byId("example").append(el("option", { value: "" }, "your own"), ...examples.map(({ name }, index) => el("option", { value: index }, name)));
byId("example").onchange = () => {
  const example = examples[byId("example").value];
  if (!example) return;
  byId("prompt").value = example.prompt;
  sampled("max_tokens").text = example.max_tokens;
  show(promptField, null);
  summarizeSampling();
};
byId("example").value = "0";
byId("example").onchange();
byId("prompt").oninput = () => {
  byId("example").value = "";
  show(promptField, null);
};
byId("run").onclick = run;
byId("stop").onclick = stop;
byId("play").onclick = () => play(timer === null);
byId("retry").onclick = connect;
byId("compare").onclick = async () => {
  const panel = await addPanel(PLAIN);
  panel.decoder.focus();
};
byId("keying").onsubmit = (event) => {
  event.preventDefault();
  key = byId("key").value;
  byId("key").value = "";
  byId("run").focus();
  decodersOf.clear();
  connect();
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") {
    byId("tip").hidden = true;
    stop();
  }
});
// Tokens a second fall while nothing comes.
setInterval(() => { for (const panel of panels) if (panel.isLive) panel.redraw(); }, 250);

function tip(target) {
  const box = byId("tip"), cell = target.closest?.(".canvas .tok"), chip = target.closest?.(".chip");
  const panel = cell && panels.find((one) => one.canvas.contains(cell));
  const lines = panel ? panel.tell(cell.look, panel.cells.indexOf(cell)) : chip?.tell?.();
  box.hidden = !lines;
  if (!lines) return;
  box.textContent = lines.map(visible).join("\n");
  const at = (cell ?? chip).getClientRects()[0] ?? target.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - box.offsetWidth - 8);
  const below = at.bottom + 10;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${below + box.offsetHeight > innerHeight ? at.top - box.offsetHeight - 6 : below}px`;
}
document.addEventListener("pointerover", ({ target }) => tip(target));
document.addEventListener("pointerdown", ({ target }) => tip(target));
document.addEventListener("focusin", ({ target }) => tip(target));
document.addEventListener("scroll", () => { byId("tip").hidden = true; }, true);

byId("version").textContent = `Chordal ${version}`;
ready();
connect();
