// The last steps as they were: from spans where they were recorded (spans.js), else a row of bars for each trainer and
// one for all rollouts, from the metrics. What is empty is time that was waited.

// Part -> [words, fill, part of the legend]. Parts of metrics and of spans that are the same have the same look.
const PARTS = {
  step: ["step", "none"],
  wait_batch: ["waits for its batch", "none"], wait: ["waits", "none"],
  train: ["trains", "var(--c0)"], stage: ["stage of training", "var(--t-stage)"],
  apply: ["the store accounts for its groups", "var(--c3)"],
  weights: ["publishes weights", "var(--c1)"], publish: ["publishes weights", "var(--c1)"],
  checkpoint: ["checkpoint", "var(--t-checkpoint)"],
  record: ["record", "var(--quiet)"], report: ["waits for the record", "var(--quiet)"],
  claim: ["claims groups", "var(--t-ahead)"], read: ["reads tokens", "var(--c0)"], build: ["builds the batch", "var(--t-stage)"],
  other: ["other", "var(--t-other)"],
  busy: ["places that hold a rollout", "var(--c2)"],
  played: ["rollout", "var(--t-rollout)"], evaluated: ["rollout of an evaluation", "var(--t-eval)"],
  failed: ["failed rollout", "var(--t-failed)"], open: ["rollout that has not ended", "var(--t-open)"],
  turn: ["turn of the main agent", "var(--c2)"], sub_turn: ["turn of a sub-agent", "var(--t-sub)"], tool: ["tool call", "var(--c3)"],
  evaluation: ["evaluation", "var(--t-eval)"], fetch: ["fetches weights", "var(--t-checkpoint)"], update: ["loads weights", "var(--c1)"],
};
const partWords = (part) => (PARTS[part] || [clean(part)])[0];
const partFill = (part) => (PARTS[part] || ["", "var(--quiet)"])[1];
const partKey = (part) => el("span", { class: "key box", style: `background:${partFill(part) === "none" ? "transparent" : partFill(part)}` });

function timelineFigure(run) {
  const found = run.timeline;
  if (!found) return null;
  const width = Math.max(340, Math.min(1340, innerWidth - 60)); // so that its text has the size of the page's
  const { picture, parts } = found.kind === "spans" ? spanPicture(found, width) : metricPicture(found, width);
  const keys = new Map(Object.keys(PARTS).filter((part) => parts.has(part) && part !== "step").map((part) => [partWords(part), part]));
  const legend = [...keys].map(([words, part]) => el("span", {}, partKey(part), words));
  const facts = [...perfFacts(run)], words = found.words || [];
  return el("section", { id: "timeline" },
    el("figure", { class: "wide", "data-timeline": found.kind }, el("figcaption", {}, "the last steps: what is empty is time that was waited" + (found.slowest ? "; outlined are the slowest rollouts" : "")),
      facts.length ? el("dl", { class: "facts" }, facts) : null, picture, el("div", { class: "legend" }, legend),
      words.map((text) => el("p", { class: "quiet", "data-words": true }, clean(text)))),
    sharesFigure(run), found.slowest ? slowestLists(found.slowest) : null);
}

// Beside the curves, which do not wait for it: a live run's rollouts end between its steps.
class Follower {
  constructor() { this.text = ""; this.found = null; this.asks = false; }
  figure(run) { return (this.found && timelineFigure({ ...run, ...this.found })) || el("section", { id: "timeline" }); }
  async look(run) {
    if (this.asks) return;
    this.asks = true;
    try {
      const found = await source.timeline(), text = JSON.stringify(found);
      const old = document.getElementById("timeline");
      if (text === this.text || !old) return;
      [this.text, this.found] = [text, found];
      old.replaceWith(this.figure(run));
    } finally { this.asks = false; }
  }
}
const follower = new Follower();

// x of a time, and the axis below a picture of height H.
function timeAxis(picture, found, L, R, W, H) {
  const x = (t) => L + ((t - found.start) / Math.max(1e-9, found.end - found.start)) * (W - L - R);
  for (const t of ticks(found.start, found.end, Math.max(2, Math.min(8, W / 110)))) picture.append(svg("text", { x: x(t), y: H - 6, "text-anchor": "middle" }, `${+t.toPrecision(6)} s`));
  return x;
}

function metricPicture(found, W) {
  const names = Object.keys(found.rows), parts = new Set();
  const L = 70, R = 8, T = 6, ROW = 26, GAP = 8, H = T + names.length * (ROW + GAP) + 22;
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "timeline of the last steps" });
  const x = timeAxis(picture, found, L, R, W, H);
  names.forEach((name, row) => {
    const y = T + row * (ROW + GAP);
    picture.append(svg("text", { x: L - 6, y: y + ROW / 2 + 4, "text-anchor": "end" }, clean(name)), svg("rect", { x: L, y, width: W - L - R, height: ROW, fill: "none", stroke: "var(--line)" }));
    for (const [step, part, start, end, share] of found.rows[name]) {
      const words = `${clean(name)}, step ${step}: ${partWords(part)}` + (part === "busy" ? ` ${Math.round(100 * share)} %` : ` ${num(end - start, 2)} s`);
      parts.add(part);
      picture.append(svg("rect", { "data-part": part, x: x(start).toFixed(2), y: (y + ROW * (1 - share)).toFixed(2), width: Math.max(0, x(end) - x(start)).toFixed(2), height: (ROW * share).toFixed(2), fill: partFill(part), "pointer-events": "all" }, svg("title", {}, words)));
    }
  });
  return { picture, parts };
}

function* perfFacts(run) {
  const last = (name) => { const points = run.series[name]; return points && points.length ? points[points.length - 1][1] : null; };
  const percent = (value) => `${Math.round(100 * value)} %`;
  // On the clock of computing, and in brackets on that of the wall.
  const both = (role, name, form, words) => {
    const own = last(`${role}/perf/${name}`), wall = last(`${role}/perf/${name}_wall`);
    if (own === null) return [];
    const text = form(own) + (wall === null ? "" : ` (${form(wall)} of wall time)`);
    return [fact(`${clean(role)} ${words}`, wall === null ? own : `${own} while it computes, ${wall} of wall time`, text)];
  };
  const busy = last("rollout/perf/busy");
  if (busy !== null) yield fact("rollout places busy", busy, percent(busy));
  for (const role of run.settings.roles) {
    const idle = last(`${role}/perf/idle`), peak = last(`${role}/perf/peak_mem_gb`);
    if (idle !== null) yield fact(`${clean(role)} trainer idle`, idle, percent(idle));
    yield* both(role, "mfu", (v) => `${(100 * v).toFixed(1)} %`, "MFU");
    yield* both(role, "tok_per_s", whole, "tokens/s");
    yield* both(role, "trained_tok_per_s", whole, "trained tokens/s");
    const shared = last(`${role}/perf/shared`);
    if (shared) yield fact(`${clean(role)} shared tokens`, shared, percent(shared));
    if (peak !== null) yield fact(`${clean(role)} peak memory`, peak, `${num(peak, 1)} GB`);
  }
}

// What the last steps of each trainer were made of.
function sharesFigure(run) {
  const roles = Object.keys(run.shares || {});
  if (!roles.length) return null;
  const W = 600, H = 16;
  return el("figure", { class: "wide", "data-shares": true }, el("figcaption", {}, "what these steps were made of"),
    el("div", { class: "shares" }, roles.flatMap((role) => {
      const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", preserveAspectRatio: "none", "aria-label": `shares of ${clean(role)}` }, svg("rect", { x: 0, y: 0, width: W, height: H, fill: "none", stroke: "var(--line)" }));
      let at = 0;
      for (const [part, share] of Object.entries(run.shares[role])) {
        picture.append(svg("rect", { "data-share": part, x: (at * W).toFixed(2), y: 0, width: (share * W).toFixed(2), height: H, fill: partFill(part), "pointer-events": "all" }, svg("title", {}, `${clean(role)} ${partWords(part)}: ${num(100 * share, 1)} %`)));
        at += share;
      }
      const facts = Object.entries(run.shares[role]).map(([part, share]) => el("span", { title: String(share) }, partKey(part), `${partWords(part)} ${num(100 * share, share < 0.1 ? 1 : 0)} %`));
      return [el("strong", {}, clean(role)), el("div", {}, picture, el("div", { class: "legend" }, facts))];
    })));
}
