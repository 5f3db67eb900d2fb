// The timeline from spans: rollout by rollout, with turns and tool calls inside, and the parts of every trainer's steps.

const HEIGHT = { main: 26, thin: 8 };
const GAP = { main: 3, thin: 3, line: 1 };
const SECOND = 1e6; // bars are in microseconds

// The more lines, the thinner; a line with rows side by side keeps room for them.
function lineHeight(rows) {
  const lines = rows.filter((row) => row.size === "line").length;
  return Math.max(3, Math.min(12, 300 / Math.max(1, lines)));
}

function spanPicture(found, W) {
  const parts = new Set(), L = 92, R = 8, T = 6, BETWEEN = 14;
  const heights = found.processes.map((p) => ({ line: lineHeight(p.rows), ...HEIGHT }));
  const H = T + 22 + found.processes.reduce((sum, p, i) => sum + BETWEEN + p.rows.reduce((own, row) => own + heights[i][row.size] + GAP[row.size], 0), 0);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "timeline of the last steps" });
  const x = timeAxis(picture, found, L, R, W, H), at = (us) => x(found.start + us / SECOND);
  const places = new Map();
  let y = T;
  found.processes.forEach((process, i) => {
    const name = clean(process.name), top = y;
    process.rows.forEach((row) => {
      const height = heights[i][row.size];
      if (row.size !== "line") picture.append(svg("rect", { x: L, y, width: W - L - R, height, fill: "none", stroke: "var(--line)" }));
      if (row.size === "thin" && row.name) picture.append(svg("text", { x: L - 4, y: y + height, class: "small", "text-anchor": "end" }, clean(row.name)));
      for (const bar of row.bars) drawBar(picture, bar, row, { name, y, height, at, parts });
      if (row.size === "main" || (row.size === "thin" && !places.has(process.name))) places.set(process.name, { top: y, bottom: y + height });
      y += height + GAP[row.size];
    });
    const lines = process.rows.filter((row) => row.size === "line").length;
    const middle = lines ? (top + y) / 2 + 4 : top + 17;
    picture.append(svg("text", { x: L - 4, y: middle, "text-anchor": "end" }, name.length > 14 ? name.slice(0, 13) + "…" : name, svg("title", {}, name)));
    y += BETWEEN;
  });
  for (const [from, start, to, end, words] of found.arrows) {
    const a = places.get(from), b = places.get(to);
    if (!a || !b) continue;
    const down = a.top < b.top, y0 = down ? a.bottom : a.top, y1 = down ? b.top : b.bottom;
    picture.append(svg("line", { class: "flow", "data-flow": true, x1: at(start).toFixed(1), y1: y0, x2: at(end).toFixed(1), y2: y1 }, svg("title", {}, `${clean(words)}: ${num((end - start) / SECOND, 2)} s from its publication to its loading by ${clean(to)}`)));
  }
  return { picture, parts };
}

function drawBar(picture, [part, start, length, words, inside, rollout, slow], row, { name, y, height, at, parts }) {
  // A rollout is as high as its line; what is inside leaves its edges free and, where some of it ran at once, shares it.
  const whole = row.size !== "line" || ["played", "evaluated", "failed", "open"].includes(part);
  const edge = whole ? 0 : height * 0.22, own = whole ? height : (height - 2 * edge) / row.rows;
  const left = at(start), width = Math.max(part === "step" ? 0 : 0.6, at(start + length) - left);
  const open = rollout && source.has(rollout) ? () => { location.hash = new URLSearchParams({ tab: "rollouts", id: rollout }); } : null;
  parts.add(part);
  picture.append(svg("rect", {
    "data-part": part, x: left.toFixed(2), y: (y + edge + (whole ? 0 : own * inside)).toFixed(2), width: width.toFixed(2), height: own.toFixed(2), fill: partFill(part),
    stroke: part === "step" || part === "wait" ? "var(--line)" : slow ? "var(--bad)" : null, "stroke-width": slow ? 1.2 : null, "pointer-events": "all", onclick: open, class: open ? "opens" : null,
  }, svg("title", {}, `${name}: ${partWords(part)}${words ? ` (${clean(words)})` : ""}, ${num(length / SECOND, length < SECOND ? 3 : 2)} s`)));
}

function slowestLists(slowest) {
  const lists = Object.entries(slowest).filter(([, list]) => list.length);
  if (!lists.length) return null;
  return el("div", { class: "slowest" }, lists.map(([title, list]) => el("figure", { "data-slowest": title }, el("figcaption", {}, `slowest ${title} of these steps`),
    el("div", { class: "scroll" }, el("table", { class: "numbers" }, el("thead", {}, el("tr", {}, ["rollout", "seconds", "what", "worker"].map((h) => el("th", {}, h)))),
      el("tbody", {}, list.map((row) => el("tr", {},
        el("td", {}, row.rollout && source.has(row.rollout) ? el("a", { href: "#" + new URLSearchParams({ tab: "rollouts", id: row.rollout }) }, clean(row.lane)) : clean(row.lane)),
        el("td", { title: `${row.seconds} s, from second ${row.at} of the run on` }, num(row.seconds, row.seconds < 10 ? 3 : 1)), el("td", { class: "text" }, clean(row.words)),
        el("td", {}, clean(row.process))))))))));
}
