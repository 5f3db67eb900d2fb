// The last steps as bars, a row for each process: what is empty is time that was waited.

const PART_NAMES = { wait_batch: "waits for its batch", train: "trains", weights: "publishes weights", other: "other", busy: "places that hold a rollout" };
const PART_FILL = { wait_batch: "none", train: "var(--c0)", weights: "var(--c1)", other: "var(--quiet)", busy: "var(--c2)" };

function timelineFigure(run) {
  const found = run.timeline;
  if (!found) return null;
  const names = Object.keys(found.rows);
  const W = Math.max(340, Math.min(1200, innerWidth - 60)), // so that its text has the size of the page's
    L = 70, R = 8, T = 6, ROW = 26, GAP = 8, H = T + names.length * (ROW + GAP) + 22;
  const x = (t) => L + ((t - found.start) / Math.max(1e-9, found.end - found.start)) * (W - L - R);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "timeline of the last steps" });
  names.forEach((name, row) => {
    const y = T + row * (ROW + GAP);
    picture.append(svg("text", { x: L - 6, y: y + ROW / 2 + 4, "text-anchor": "end" }, clean(name)), svg("rect", { x: L, y, width: W - L - R, height: ROW, fill: "none", stroke: "var(--line)" }));
    for (const [step, part, start, end, share] of found.rows[name]) {
      const words = `${name}, step ${step}: ${PART_NAMES[part]}` + (part === "busy" ? ` ${Math.round(100 * share)} %` : ` ${num(end - start, 2)} s`);
      picture.append(svg("rect", { "data-part": part, x: x(start).toFixed(2), y: (y + ROW * (1 - share)).toFixed(2), width: Math.max(0, x(end) - x(start)).toFixed(2), height: (ROW * share).toFixed(2), fill: PART_FILL[part], "pointer-events": "all" }, svg("title", {}, words)));
    }
  });
  for (const t of ticks(found.start, found.end, 8)) picture.append(svg("text", { x: x(t), y: H - 6, "text-anchor": "middle" }, `${+t.toPrecision(6)} s`));
  const parts = [...new Set(Object.values(found.rows).flat().map((bar) => bar[1]))];
  const legend = Object.keys(PART_NAMES).filter((part) => parts.includes(part)).map((part) => el("span", {}, el("span", { class: "key box", style: `background:${part === "wait_batch" ? "transparent" : PART_FILL[part]}` }), PART_NAMES[part]));
  const shares = [...shareFacts(run)];
  return el("figure", { class: "wide", "data-timeline": true }, el("figcaption", {}, "the last steps: what is empty is time that was waited"), shares.length ? el("dl", { class: "facts" }, shares) : null, picture, el("div", { class: "legend" }, legend));
}

function* shareFacts(run) {
  const last = (name) => { const points = run.series[name]; return points && points.length ? points[points.length - 1][1] : null; };
  const percent = (value) => `${Math.round(100 * value)} %`;
  const busy = last("rollout/perf/busy");
  if (busy !== null) yield fact("rollout places busy", busy, percent(busy));
  for (const role of run.settings.roles) {
    const idle = last(`${role}/perf/idle`);
    if (idle !== null) yield fact(`${clean(role)} trainer idle`, idle, percent(idle));
  }
}
