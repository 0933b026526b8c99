const content = JSON.parse(document.getElementById("data").textContent);
const { conditions, rows } = content;
const ALL = "all";
const MINUS = "\u2013"; // an en dash, where there is no figure
const COLOURS = 6;
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-0.88 * r},${-0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}Z`,
  (r) => `M0,${-1.15 * r}L${1.1 * r},${0.8 * r}H${-1.1 * r}Z`,
  (r) => `M0,${-1.25 * r}L${1.25 * r},0L0,${1.25 * r}L${-1.25 * r},0Z`,
  (r) => `M0,${1.15 * r}L${1.1 * r},${-0.8 * r}H${-1.1 * r}Z`,
];
const PLUS = (r) => `M${-1.3 * r},0H${1.3 * r}M0,${-1.3 * r}V${1.3 * r}`;

// ---- What is shown now -------------------------------------------------------------------------

const state = { task: ALL, filter: "", picked: new Set(), sort: { key: "ratio", descending: true } };
const taskNames = conditions.tasks.map((task) => task.name);
const decoderNames = [...new Set(conditions.decoders.map((decoder) => decoder.decoder))];

const rowsOf = (task) =>
  rows.filter((row) => row.task === task && row.label.toLowerCase().includes(state.filter));
const isFaded = (decoder) => state.picked.size > 0 && !state.picked.has(decoder);

// ---- Numbers ------------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number";
const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : MINUS);
const percent = (share) => (isNumber(share) ? `${(100 * share).toFixed(1)}%` : MINUS);
const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en-US") : MINUS);
const times = (ratio) => (ratio ? `${fixed(ratio.median, 2)}x` : MINUS);
const range = (low, high, digits) => `${fixed(low, digits)} to ${fixed(high, digits)}`;

/** Give the share that stands for a row's quality and its interval, null where nothing was measured. */
function quality(row) {
  if (row.quality) return { value: row.quality.value, low: row.quality.low, high: row.quality.high };
  return isNumber(row.same_text) ? { value: row.same_text, low: row.same_text, high: row.same_text } : null;
}
const isGraded = (task) => rows.some((row) => row.task === task && row.quality);
const qualityName = (task) => (isGraded(task) ? "Accuracy" : "Same text as plain decoding");

const COLUMNS = [
  { key: "promise", title: "promise", isText: true, value: (row) => row.promise },
  {
    key: "accuracy",
    title: "accuracy",
    value: (row) => row.quality?.value ?? null,
    text: (row) => percent(row.quality?.value),
    small: (row) => row.quality && range(100 * row.quality.low, 100 * row.quality.high, 1),
  },
  {
    key: "same_text",
    title: "same\ntext",
    value: (row) => row.same_text,
    text: (row) => percent(row.same_text),
  },
  {
    key: "tokens_per_forward",
    title: "tokens per\nforward",
    value: (row) => row.tokens_per_forward,
    text: (row) => fixed(row.tokens_per_forward, 2),
  },
  {
    key: "acceptance_length",
    title: "acceptance\nlength",
    value: (row) => row.acceptance_length,
    text: (row) => fixed(row.acceptance_length, 2),
    optional: true,
  },
  {
    key: "ratio",
    title: "ratio\nto plain",
    value: (row) => row.ratio?.median ?? null,
    text: (row) => times(row.ratio),
    small: (row) => row.ratio && range(row.ratio.low, row.ratio.high, 2),
  },
  {
    key: "tokens_per_s",
    title: "tokens/s",
    value: (row) => row.tokens_per_s,
    text: (row) => fixed(row.tokens_per_s, 1),
  },
  {
    key: "ttft_s",
    title: "first\ntoken",
    value: (row) => row.ttft_s,
    text: (row) => (isNumber(row.ttft_s) ? `${fixed(1000 * row.ttft_s, 1)} ms` : MINUS),
    optional: true,
  },
  {
    key: "seconds",
    title: "seconds\na round",
    value: (row) => row.seconds.median,
    text: (row) => fixed(row.seconds.median, 2),
    small: (row) => range(row.seconds.low, row.seconds.high, 2),
  },
  { key: "tokens", title: "tokens", value: (row) => row.tokens, text: (row) => whole(row.tokens) },
  { key: "forwards", title: "forwards", value: (row) => row.forwards, text: (row) => whole(row.forwards) },
  {
    key: "draft_forwards",
    title: "forwards of\nother models",
    value: (row) => row.draft_forwards,
    text: (row) => whole(row.draft_forwards),
    optional: true,
  },
  {
    key: "positions_fed",
    title: "positions\nfed",
    value: (row) => row.positions_fed,
    text: (row) => whole(row.positions_fed),
  },
  {
    key: "peak_memory_bytes",
    title: "peak\nmemory",
    value: (row) => row.peak_memory_bytes,
    text: (row) =>
      isNumber(row.peak_memory_bytes) ? `${fixed(row.peak_memory_bytes / 2 ** 30, 2)} GiB` : MINUS,
    optional: true,
  },
  {
    key: "num_errors",
    title: "failed",
    value: (row) => row.num_errors,
    text: (row) => whole(row.num_errors),
    optional: true,
  },
];

// ---- Marks: a colour and a shape for each decoder, filled if exact, a plus for the plain one -------

const colourOf = (decoder) => `var(--c${decoderNames.indexOf(decoder) % COLOURS})`;
const shapeOf = (decoder) => SHAPES[decoderNames.indexOf(decoder) % SHAPES.length];

function mark(row, radius) {
  if (row.is_baseline)
    return svg("path", {
      class: "mark",
      d: PLUS(radius),
      style: { stroke: "var(--ink)", "stroke-width": 3 },
    });
  const colour = colourOf(row.decoder);
  const style = { stroke: colour, fill: row.promise === "exact" ? colour : "var(--page)" };
  return svg("path", { class: "mark", d: shapeOf(row.decoder)(radius), style });
}
const icon = (row) => svg("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark(row, 4.2));

// ---- Tooltip ------------------------------------------------------------------------------------

const facts = (row) => [
  [
    qualityName(row.task).toLowerCase(),
    row.quality
      ? `${percent(row.quality.value)} (${range(100 * row.quality.low, 100 * row.quality.high, 1)})`
      : percent(row.same_text),
  ],
  ["tokens per forward", fixed(row.tokens_per_forward, 2)],
  ["ratio to plain", row.ratio ? `${times(row.ratio)} (${range(row.ratio.low, row.ratio.high, 2)})` : MINUS],
  ["tokens/s", fixed(row.tokens_per_s, 1)],
  ["promise", row.promise],
];

let anchor = null; // what the tooltip belongs to

function showTip(row, point) {
  anchor = point;
  byId("tip").replaceChildren(
    el("strong", { class: "label" }, row.label),
    el(
      "dl",
      {},
      facts(row).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    ),
  );
  placeTip();
}

function placeTip() {
  const tip = byId("tip");
  tip.hidden = anchor === null;
  if (!anchor) return;
  const at = anchor.getBoundingClientRect();
  const left = Math.min(
    Math.max(8, at.left + at.width / 2 - tip.offsetWidth / 2),
    innerWidth - tip.offsetWidth - 8,
  );
  const above = at.top - tip.offsetHeight - 6;
  fill(tip, { style: { left: `${left}px`, top: `${above > 8 ? above : at.bottom + 6}px` } }, []);
}
function hideTip() {
  anchor = null;
  placeTip();
}

// ---- Quality against parallelism ------------------------------------------------------------------

const TICKS = [0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512];
const drawn = (task) => rowsOf(task).filter((row) => quality(row) && row.tokens_per_forward > 0);
const boundsOf = (task) => content.bounds.filter((bound) => bound.task === task && bound.points.length);

/** Give the axes for some tasks: tokens per forward on a logarithmic scale, quality from `floor` to 1. */
function axes(tasks, { width, height, margin, floor }) {
  const xs = tasks.flatMap((task) => drawn(task).map((row) => row.tokens_per_forward));
  const [low, high] = [Math.min(1, ...xs) / 1.06, Math.max(2, ...xs) * 1.06];
  const inner = {
    left: margin.left,
    right: width - margin.right,
    top: margin.top,
    bottom: height - margin.bottom,
  };
  return {
    ...inner,
    low,
    high,
    floor,
    x: (value) => inner.left + ((inner.right - inner.left) * Math.log(value / low)) / Math.log(high / low),
    y: (share) => inner.bottom - ((inner.bottom - inner.top) * (share - floor)) / (1 - floor),
  };
}

function drawGrid(scale, isSmall) {
  const inside = TICKS.filter((tick) => tick >= scale.low && tick <= scale.high);
  const far = scale.x(2) - scale.x(1) > (isSmall ? 70 : 110); // between doublings there is room for one more
  const xTicks = inside.filter((tick) => far || Number.isInteger(Math.log2(tick)));
  const step = 1 - scale.floor > 0.5 ? (isSmall ? 0.5 : 0.2) : 1 - scale.floor > 0.2 ? 0.1 : 0.05;
  const yTicks = [];
  for (let tick = 1; tick >= scale.floor - 1e-9; tick -= step) yTicks.push(tick);
  return [
    xTicks.map((tick) => [
      svg("line", { class: "grid", x1: scale.x(tick), x2: scale.x(tick), y1: scale.top, y2: scale.bottom }),
      svg("text", { x: scale.x(tick), y: scale.bottom + 15, "text-anchor": "middle" }, `${tick}`),
    ]),
    yTicks.map((tick) => [
      svg("line", { class: "grid", x1: scale.left, x2: scale.right, y1: scale.y(tick), y2: scale.y(tick) }),
      svg(
        "text",
        { x: scale.left - 6, y: scale.y(tick) + 4, "text-anchor": "end" },
        `${Math.round(100 * tick)}%`,
      ),
    ]),
  ];
}

const polyline = (scale, points) =>
  points
    .map(([x, y], index) => `${index ? "L" : "M"}${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`)
    .join("");

/** Draw a bound between the axes' ends, straight between its points on the shown scale. */
function drawBound(scale, bound) {
  const inside = bound.points.filter(([x]) => x >= scale.low && x <= scale.high);
  const next = bound.points.find(([x]) => x > scale.high);
  if (next && inside.length) {
    const [x0, y0] = inside[inside.length - 1];
    const part = Math.log(scale.high / x0) / Math.log(next[0] / x0);
    inside.push([scale.high, y0 + part * (next[1] - y0)]);
  }
  return svg("path", { class: "bound", d: polyline(scale, inside) }, svg("title", {}, bound.form ?? ""));
}

/** Draw lines through each decoder's settings, which are one curve over its dial. */
function drawCurves(scale, shown) {
  return decoderNames.map((decoder) => {
    const points = shown
      .filter((row) => row.decoder === decoder && !row.is_baseline)
      .map((row) => [row.tokens_per_forward, quality(row).value])
      .sort((a, b) => a[0] - b[0]);
    if (points.length < 2) return null;
    return svg("path", {
      class: `path ${isFaded(decoder) ? "faded" : ""}`,
      d: polyline(scale, points),
      style: { stroke: colourOf(decoder) },
    });
  });
}

/** Give the rows that no other one beats in both quality and parallelism. */
function frontier(shown) {
  let best = -1;
  return [...shown]
    .sort((a, b) => b.tokens_per_forward - a.tokens_per_forward || quality(b).value - quality(a).value)
    .filter((row) => quality(row).value > best && ((best = quality(row).value), true));
}

/** Name the frontier and the plain decoder where there is room beside their marks. */
function drawNames(scale, shown) {
  const boxes = shown.map((row) => {
    const [x, y] = [scale.x(row.tokens_per_forward), scale.y(quality(row).value)];
    return [x - 6, y - 6, x + 6, y + 6];
  });
  const hits = (box) =>
    box[0] < scale.left ||
    box[2] > scale.right ||
    box[1] < 0 ||
    box[3] > scale.bottom ||
    boxes.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]);
  const named = new Set([
    ...shown.filter((row) => row.is_baseline),
    ...frontier(shown),
    ...shown.filter((row) => state.picked.has(row.decoder)),
  ]);
  return [...named].map((row) => {
    if (isFaded(row.decoder)) return null;
    const text = row.label.length > 44 ? `${row.label.slice(0, 43)}\u2026` : row.label;
    const [x, y, width] = [scale.x(row.tokens_per_forward), scale.y(quality(row).value), 6.1 * text.length];
    for (const [dx, dy, anchor] of [
      [9, 4, 0],
      [-9, 4, 1],
      [0, -10, 0.5],
      [0, 18, 0.5],
      [8, -8, 0],
      [8, 16, 0],
      [-8, -8, 1],
      [-8, 16, 1],
    ]) {
      const left = x + dx - anchor * width;
      const box = [left, y + dy - 10, left + width, y + dy + 3];
      if (hits(box)) continue;
      boxes.push(box);
      return svg(
        "text",
        { class: "name", x: x + dx, y: y + dy, "text-anchor": ["start", "middle", "end"][2 * anchor] },
        text,
      );
    }
    return null;
  });
}

function drawPoint(scale, row, radius) {
  const { value, low, high } = quality(row);
  const x = scale.x(row.tokens_per_forward);
  const clamp = (share) => scale.y(Math.max(scale.floor, share));
  return svg(
    "g",
    { class: `point ${isFaded(row.decoder) ? "faded" : ""}` },
    svg("line", {
      class: "interval",
      x1: x,
      x2: x,
      y1: clamp(low),
      y2: clamp(high),
      style: { stroke: row.is_baseline ? "var(--ink)" : colourOf(row.decoder) },
    }),
    svg(
      "g",
      { transform: `translate(${x},${clamp(value)})` },
      radius > 3 ? svg("circle", { class: "halo", r: 11 }) : null,
      mark(row, radius),
    ),
  );
}

function drawPlot() {
  const box = byId("plot");
  const [shown, bounds] = [drawn(state.task), boundsOf(state.task)];
  const name = qualityName(state.task);
  const unplotted = rowsOf(state.task).length - shown.length;
  byId("quality-note").textContent = [
    "Up and to the right is better.",
    isGraded(state.task)
      ? "Upright lines are 95% intervals, lines join the settings of one decoder."
      : "Nothing of this task was graded: agreement with the plain decoder stands in.",
    bounds.length ? `Dashed: ${[...new Set(bounds.map((bound) => bound.form))].join("; ")}.` : "",
    unplotted ? `${unplotted} without these figures are only in the table.` : "",
  ].join(" ");
  if (!shown.length)
    return box.replaceChildren(el("p", { class: "soft" }, "Nothing to draw for this choice."));
  const width = Math.max(280, box.clientWidth);
  const height = Math.min(500, Math.max(320, 0.62 * width));
  const lowest = Math.min(...shown.map((row) => quality(row).low));
  const floor = bounds.length ? 0 : Math.max(0, Math.min(0.9, Math.floor(10 * lowest) / 10));
  const scale = axes([state.task], {
    width,
    height,
    margin: { left: 46, right: 12, top: 30, bottom: 44 },
    floor,
  });
  const points = [...shown].sort((a, b) => a.tokens_per_forward - b.tokens_per_forward);
  const marks = points.map((row, index) => {
    const point = drawPoint(scale, row, 5);
    fill(
      point,
      {
        tabindex: index ? -1 : 0,
        role: "img",
        "data-label": row.label,
        "aria-label": `${row.label}: ${facts(row)
          .map(([fact, value]) => `${fact} ${value}`)
          .join(", ")}`,
        onpointerenter: () => showTip(row, point),
        onpointerleave: hideTip,
        onfocus: () => showTip(row, point),
        onblur: hideTip,
      },
      [],
    );
    return point;
  });
  box.replaceChildren(
    svg(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        height,
        role: "group",
        onkeydown: (event) => rove(event, marks),
        "aria-label": `${name} against tokens per forward, ${shown.length} decoders; arrow keys walk them`,
      },
      drawGrid(scale, false),
      svg(
        "text",
        { x: 2, y: 14 },
        `${name}${scale.floor > 0 ? ` (axis starts at ${Math.round(100 * scale.floor)}%)` : ""}`,
      ),
      svg("text", { x: scale.right, y: height - 8, "text-anchor": "end" }, "tokens per forward, logarithmic"),
      drawCurves(scale, shown),
      bounds.map((bound) => drawBound(scale, bound)),
      marks,
      drawNames(scale, shown),
    ),
  );
}

/** Move the focus among marks with the arrow keys; the plot is one stop of the Tab key. */
function rove(event, marks) {
  const at = marks.indexOf(document.activeElement);
  const to = {
    ArrowRight: at + 1,
    ArrowDown: at + 1,
    ArrowLeft: at - 1,
    ArrowUp: at - 1,
    Home: 0,
    End: marks.length - 1,
  }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  const next = marks[Math.min(Math.max(to, 0), marks.length - 1)];
  marks.forEach((point) => point.setAttribute("tabindex", point === next ? 0 : -1));
  next.focus();
}

function drawLegend() {
  const shown = rowsOf(state.task);
  const plain = shown.find((row) => row.is_baseline);
  const entries = decoderNames.flatMap((decoder) => {
    const row = shown.find((one) => one.decoder === decoder && !one.is_baseline);
    if (!row) return [];
    const press = () => {
      state.picked.delete(decoder) || state.picked.add(decoder);
      draw();
      [...document.querySelectorAll("#legend button")]
        .find((button) => button.dataset.decoder === decoder)
        ?.focus();
    };
    return el(
      "li",
      {},
      el(
        "button",
        {
          type: "button",
          "data-decoder": decoder,
          "aria-pressed": `${state.picked.has(decoder)}`,
          onclick: press,
        },
        icon(row),
        decoder,
      ),
    );
  });
  byId("legend").replaceChildren(
    ...entries,
    el(
      "li",
      { class: "note" },
      plain ? [el("span", { class: "key" }, icon(plain), "plain decoding")] : null,
      "Filled: exact. Hollow: approximate.",
    ),
  );
}

// ---- Speed ----------------------------------------------------------------------------------------

function drawBars() {
  const shown = rowsOf(state.task)
    .filter((row) => row.ratio)
    .sort((a, b) => b.ratio.median - a.ratio.median);
  const most = Math.max(1, ...shown.map((row) => Math.max(row.ratio.median, row.ratio.high)));
  const at = (value) => `${(100 * value) / most}%`;
  const items = shown.map((row) => {
    const colour = row.is_baseline ? "var(--ink)" : colourOf(row.decoder);
    const soft = `color-mix(in srgb, ${colour} 22%, transparent)`;
    const isSolid = row.is_baseline || row.promise === "exact";
    return el(
      "li",
      {
        class: `${row.is_baseline ? "baseline" : ""} ${isFaded(row.decoder) ? "faded" : ""}`,
        "data-label": row.label,
      },
      el("span", { class: "key" }, icon(row), el("span", { class: "label" }, row.label)),
      el(
        "div",
        { class: "track", "aria-hidden": "true", style: { "--one": at(1) } },
        el("i", {
          class: "bar",
          style: { width: at(row.ratio.median), "border-color": colour, background: isSolid ? colour : soft },
        }),
        el("i", {
          class: "whisker",
          style: { left: at(row.ratio.low), width: at(row.ratio.high - row.ratio.low) },
        }),
      ),
      el(
        "span",
        { class: "figures" },
        el("strong", { title: `quartiles ${range(row.ratio.low, row.ratio.high, 2)}` }, times(row.ratio)),
        el(
          "span",
          { class: "soft" },
          quality(row) ? `${percent(quality(row).value)}${row.quality ? "" : " same"}` : MINUS,
        ),
      ),
    );
  });
  byId("bars").replaceChildren(
    ...(items.length ? items : [el("li", { class: "soft" }, "No timed round was finished for this choice.")]),
  );
}

// ---- Every task -------------------------------------------------------------------------------------

function drawMultiples() {
  const names = taskNames.filter((task) => rows.some((row) => row.task === task));
  byId("tasks-section").hidden = names.length < 2;
  const cards = names.map((task) => {
    const [width, height] = [250, 180];
    const scale = axes(names, {
      width,
      height,
      margin: { left: 38, right: 6, top: 8, bottom: 22 },
      floor: 0,
    });
    const shown = drawn(task);
    return el(
      "button",
      {
        type: "button",
        "aria-pressed": `${task === state.task}`,
        "data-task": task,
        onclick: () => chooseTask(task === state.task ? firstTask() : task),
      },
      el("span", { class: "label" }, task),
      isGraded(task) ? null : el("small", { class: "soft" }, " same text"),
      svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
        drawGrid(scale, true),
        drawCurves(scale, shown),
        boundsOf(task).map((bound) => drawBound(scale, bound)),
        shown.map((row) => drawPoint(scale, row, 2.8)),
      ),
    );
  });
  byId("multiples").replaceChildren(...cards);
}

// ---- Tables -----------------------------------------------------------------------------------------

const headings = (titles, isText) =>
  el(
    "thead",
    {},
    el(
      "tr",
      {},
      titles.map((title, index) => el("th", { scope: "col", class: isText(index) ? "text" : "" }, title)),
    ),
  );

/** Order rows by a column; those without a figure come last either way. */
function sorted(shown, column, descending) {
  const sign = descending ? -1 : 1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  const value = (row) =>
    isNumber(column.value(row)) || typeof column.value(row) === "string" ? column.value(row) : null;
  return [...shown].sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === null || other === null) return (one === null) - (other === null);
    return sign * compare(one, other);
  });
}

function drawTable() {
  const label = { key: "label", title: "decoder", isText: true, value: (row) => row.label };
  const used = [
    label,
    ...COLUMNS.filter((column) => !column.optional || rows.some((row) => column.value(row))),
  ];
  const { key, descending } = state.sort;
  const order = (column) => {
    state.sort = { key: column.key, descending: column.key === key ? !descending : !column.isText };
    drawTable();
    byId("table").querySelector(`[data-key="${column.key}"]`).focus();
  };
  const head = used.map((column) =>
    el(
      "th",
      {
        scope: "col",
        class: column.isText ? "text" : "",
        "aria-sort": column.key === key ? (descending ? "descending" : "ascending") : null,
      },
      el("button", { type: "button", "data-key": column.key, onclick: () => order(column) }, column.title),
    ),
  );
  const body = sorted(
    rowsOf(state.task),
    used.find((column) => column.key === key),
    descending,
  ).map((row) =>
    el(
      "tr",
      { class: row.is_baseline ? "baseline" : "", "data-label": row.label },
      el(
        "th",
        { scope: "row" },
        el("span", { class: "key" }, icon(row), el("span", { class: "label" }, row.label)),
      ),
      used
        .slice(1)
        .map((column) =>
          el(
            "td",
            { class: column.isText ? "text" : "", "data-key": column.key },
            column.text ? column.text(row) : column.value(row),
            column.small?.(row) ? [" ", el("small", {}, column.small(row))] : null,
          ),
        ),
    ),
  );
  byId("table").replaceChildren(el("thead", {}, el("tr", {}, head)), el("tbody", {}, body));
}

function drawAup() {
  const shown = content.aup.filter(
    (area) => area.task === state.task && area.decoder.toLowerCase().includes(state.filter.split(":")[0]),
  );
  byId("aup-section").hidden = !content.aup.some((area) => area.task === state.task);
  const lines = shown
    .sort((a, b) => b.aup - a.aup)
    .map((area) =>
      el(
        "tr",
        {},
        el("th", { scope: "row", class: "label" }, area.decoder),
        [
          fixed(area.aup, 1),
          fixed(area.aup_published, 1),
          `${fixed(area.ymax, 1)}%`,
          whole(area.points.length),
        ].map((text) => el("td", {}, text)),
      ),
    );
  byId("aup").replaceChildren(
    headings(
      ["decoder", "AUP, fixed", "AUP, as published", "best accuracy here", "settings"],
      (index) => index === 0,
    ),
    el("tbody", {}, lines),
  );
}

// ---- What does not change with the choice -------------------------------------------------------------

const plain = (value) => {
  if (value === null || value === undefined) return "none";
  if (Array.isArray(value)) return value.map(plain).join(", ");
  if (typeof value === "object")
    return Object.entries(value)
      .map(([name, entry]) => `${name}: ${plain(entry)}`)
      .join(", ");
  return String(value);
};

function drawSetup() {
  const { hardware = {} } = conditions;
  byId("setup").textContent = [
    hardware.device,
    conditions.dtype,
    `threads: ${plain(conditions.threads)}`,
    `batch size: ${plain(conditions.batch_size)}`,
    `timed rounds: ${plain(conditions.repeats)}`,
    `decoders: ${conditions.decoders.length}`,
    `tasks: ${conditions.tasks.length}`,
    conditions.created,
  ]
    .filter(Boolean)
    .join(" \u00b7 ");
  const failed = content.failures.reduce((sum, failure) => sum + failure.num_errors, 0);
  const numRuns = conditions.decoders.length * conditions.tasks.length;
  const warnings = [
    failed ? `${whole(failed)} samples failed; they count as wrong.` : "",
    content.missing.length
      ? `Unfinished: ${whole(content.missing.length)} of ${whole(numRuns)} runs have no figures yet.`
      : "",
  ].filter(Boolean);
  byId("warnings").textContent = warnings.join(" ");
  byId("warnings").hidden = !warnings.length;
  byId("highlights").replaceChildren(
    ...content.highlights.map((highlight) =>
      el(
        "div",
        { class: "tile" },
        el("h2", {}, highlight.heading),
        el("p", { class: "value" }, highlight.value),
        highlight.label === null ? null : el("p", { class: "label" }, highlight.label),
        el("p", { class: "soft" }, highlight.text),
      ),
    ),
  );
}

function drawFailures() {
  const failed = content.failures.map((failure) =>
    el(
      "li",
      {},
      el("span", { class: "label" }, failure.label),
      ` on ${failure.task}: ${failure.num_errors} of ${failure.num_prompts} samples failed.`,
      failure.messages.map((message) =>
        el("div", { class: "soft" }, `sample ${message.index}: ${message.error}`),
      ),
    ),
  );
  const missing = content.missing.map((run) =>
    el("li", {}, el("span", { class: "label" }, run.label), ` on ${run.task}: not run yet.`),
  );
  const lists = [failed, missing].filter((items) => items.length).map((items) => el("ul", {}, items));
  byId("failures").replaceChildren(
    ...(lists.length ? lists : [el("p", {}, "Nothing: every sample of every decoder was decoded.")]),
  );
}

function drawConditions() {
  const entries = Object.entries(conditions).filter(([name]) => name !== "tasks" && name !== "decoders");
  byId("conditions").replaceChildren(
    ...entries.flatMap(([name, value]) => [
      el("dt", {}, name.replaceAll("_", " ")),
      el("dd", {}, name === "command" || name === "commit" ? el("code", {}, plain(value)) : plain(value)),
    ]),
  );
  const keys = [...new Set(conditions.tasks.flatMap(Object.keys))];
  byId("tasks").replaceChildren(
    headings(
      keys.map((name) => name.replaceAll("_", " ")),
      () => true,
    ),
    el(
      "tbody",
      {},
      conditions.tasks.map((task) =>
        el(
          "tr",
          {},
          keys.map((name, index) =>
            el(index ? "td" : "th", { class: "text", scope: index ? null : "row" }, plain(task[name])),
          ),
        ),
      ),
    ),
  );
  byId("settings").replaceChildren(
    headings(["decoder", "promise", "settings"], () => true),
    el(
      "tbody",
      {},
      conditions.decoders.map((decoder) =>
        el(
          "tr",
          {},
          el("th", { scope: "row", class: "label" }, decoder.label),
          el("td", { class: "text" }, decoder.promise),
          el(
            "td",
            { class: "text wrap" },
            Object.entries(decoder.settings)
              .map(([name, value]) => `${name}=${plain(value)}`)
              .join(", "),
          ),
        ),
      ),
    ),
  );
}

// ---- Putting it together --------------------------------------------------------------------------------

const firstTask = () => [ALL, ...taskNames].find((task) => rows.some((row) => row.task === task)) ?? ALL;

function chooseTask(task) {
  state.task = task;
  byId("task").value = task;
  draw();
  document.querySelector(`#multiples [aria-pressed="true"]`)?.focus({ preventScroll: true });
}

function draw() {
  hideTip();
  byId("clear").hidden = !state.picked.size;
  for (const part of [drawPlot, drawLegend, drawBars, drawMultiples, drawTable, drawAup]) part();
}

function start() {
  const groups = [...new Set(conditions.tasks.map((task) => task.group))];
  const option = (task, text) =>
    el("option", { value: task, disabled: !rows.some((row) => row.task === task) }, text);
  byId("task").append(
    option(ALL, "all tasks"),
    ...groups.map((group) =>
      el(
        "optgroup",
        { label: group },
        conditions.tasks.filter((task) => task.group === group).map((task) => option(task.name, task.name)),
      ),
    ),
  );
  byId("task").addEventListener("change", (event) => {
    state.task = event.target.value;
    draw();
  });
  byId("filter").addEventListener("input", (event) => {
    state.filter = event.target.value.trim().toLowerCase();
    draw();
  });
  byId("clear").addEventListener("click", () => {
    state.picked.clear();
    draw();
    byId("task").focus();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTip();
  });
  addEventListener("scroll", placeTip, { passive: true });
  document.querySelector("main").hidden = false;
  state.task = byId("task").value = firstTask();
  for (const part of [drawSetup, drawFailures, drawConditions, draw]) part();
  let width = byId("plot").clientWidth;
  new ResizeObserver(() => {
    if (byId("plot").clientWidth !== width) {
      width = byId("plot").clientWidth;
      drawPlot();
    }
  }).observe(byId("plot"));
}

start();
