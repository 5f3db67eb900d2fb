// Curves per agent: small multiples, one quantity each, the same colour for the same agent everywhere.

const colour = (index) => `var(--c${index % 4})`;
const DASH = ["", "5 3", "2 3", "8 3 2 3"];

function charts(run) {
  const roles = run.settings.roles;
  const seen = (line) => line.points && line.points.some((p) => p[1] > 0);
  const perRole = (name, among = roles) => among.map((role) => ({ label: role, index: roles.indexOf(role), points: run.series[`${role}/${name}`] }));
  const accuracy = ["validation", "heldout"].flatMap((split, i) => ["sampled", "greedy"].map((mode, j) => ({ label: `${split}, ${mode}`, index: j, dash: i, dots: i === 1, points: run.series[`eval/${split}/${mode}`] })));
  const sets = Object.keys(run.series).filter((n) => /^eval\/[^/]+\/avg$/.test(n)).map((n) => n.split("/")[1]);
  const ofSets = sets.map((name, i) => ({ label: clean(name), index: i, dash: Math.floor(i / 4), points: run.series[`eval/${name}/avg`], errors: run.series[`eval/${name}/stderr`] }));
  const failedInSets = sets.map((name, i) => ({ label: clean(name), index: i, dash: Math.floor(i / 4), points: run.series[`eval/${name}/failed`] })).filter(seen);
  const ofTags = (set) => Object.keys(run.series).filter((n) => n.startsWith(`eval/${set}/`) && n.endsWith("/avg") && n.split("/").length > 3).sort()
    .map((n, i) => ({ label: clean(n.split("/").slice(2, -1).join("/")), index: i, dash: Math.floor(i / 4), points: run.series[n] }));
  const kinds = Object.keys(FAILURES).map((kind, i) => ({ label: kind, index: i - 1, dash: i > 4 ? 1 : 0, points: run.series[`rollout/failed_by_${kind}`] })).filter(seen);
  const subs = roles.slice(1);
  const own = [...new Set(Object.keys(run.series).map((n) => n.split("/")).filter((n) => n[1] === "task").map((n) => n[2]))].sort();
  const ofTask = (name) => [...perRole(`task/${name}`), { label: "rollout", index: 0, dash: 1, points: run.series[`rollout/task/${name}`] }];
  return [
    ["accuracy on questions never trained on", accuracy, [0, 1]],
    ["accuracy on the named sets, mean of the repeats", ofSets, [0, 1]],
    ...sets.map((set) => [`${clean(set)} by tag`, ofTags(set), [0, 1]]),
    ["failed rollouts of the named sets", failedInSets],
    ["mean reward", perRole("reward/mean")],
    ["share of correct answers in training", [{ label: "correct", index: 0, points: run.series["main/reward/correct"] }], [0, 1]],
    ["invocations per rollout, d_k", perRole("d_k/mean", subs)],
    ["entropy of the policy, nats", perRole("policy/entropy")],
    ["tokens whose ratio was clipped above", perRole("loss/clip_ratio_high")],
    ["trajectories with advantage 0", perRole("advantage/frac_zero")],
    ["gradient norm", perRole("policy/grad_norm")],
    ["copies among the aligned", perRole("align/dup_ratio", subs)],
    ["dropped by the alignment", perRole("align/drop_ratio", subs)],
    ["failed rollouts by kind", kinds],
    ["sampled tokens per second", [{ label: "all agents", index: 0, points: run.series["rollout/perf/tok_per_s"] }]],
    ["seconds per step", perRole("time/step")],
    ["share of the rollout places that were busy", [{ label: "all agents", index: 0, points: run.series["rollout/perf/busy"] }], [0, 1]],
    ["weights sent, share of a whole version", perRole("weights/share")],
    ["share of a step that its trainer waited", perRole("perf/idle"), [0, 1]],
    ["tokens of shared prefixes, share of all", perRole("perf/shared").filter(seen), [0, 1]],
    ...own.map((name) => [`${name} (reported by the task)`, ofTask(name)]),
  ].map(([title, lines, range]) => chart(title, lines.filter((line) => line.points && line.points.length), range)).filter(Boolean);
}

function ticks(low, high, n) {
  const raw = (high - low) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= raw);
  const out = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) out.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return out;
}

function chart(title, lines, range) {
  if (!lines.length) return null;
  const W = 360, H = 190, L = 42, R = 8, T = 8, B = 24;
  const all = lines.flatMap((line) => line.points);
  const x0 = Math.min(...all.map((p) => p[0])), x1 = Math.max(...all.map((p) => p[0]), x0 + 1);
  let [y0, y1] = range || [Math.min(0, ...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  if (y0 === y1) y1 = y0 + 1;
  const x = (v) => L + ((v - x0) / (x1 - x0)) * (W - L - R);
  const y = (v) => H - B - ((v - y0) / (y1 - y0)) * (H - B - T);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const t of ticks(y0, y1, 4)) {
    picture.append(svg("line", { x1: L, x2: W - R, y1: y(t), y2: y(t), stroke: "var(--line)" }), svg("text", { x: L - 5, y: y(t) + 4, "text-anchor": "end" }, String(+t.toPrecision(4))));
  }
  for (const t of ticks(x0, x1, Math.max(1, Math.min(6, x1 - x0)))) picture.append(svg("text", { x: x(t), y: H - 8, "text-anchor": "middle" }, String(+t.toPrecision(6))));
  for (const line of lines) {
    const at = line.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    if (!line.dots) picture.append(svg("polyline", { points: at.join(" "), fill: "none", stroke: colour(line.index), "stroke-width": 1.8, "stroke-dasharray": DASH[(line.dash || 0) % DASH.length] }));
    const spread = new Map((line.errors || []).map((p) => [p[0], p[1]]));
    for (const p of line.points) if (spread.get(p[0])) picture.append(svg("line", { class: "error", x1: x(p[0]), x2: x(p[0]), y1: y(Math.max(y0, p[1] - spread.get(p[0]))), y2: y(Math.min(y1, p[1] + spread.get(p[0]))), stroke: colour(line.index) }));
    if (line.dots || line.points.length < 25) for (const p of line.points) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: line.dots ? 4 : 2.5, fill: colour(line.index) }, svg("title", {}, `${line.label}, step ${p[0]}: ${p[1]}` + (spread.has(p[0]) ? ` ± ${spread.get(p[0])}` : ""))));
  }
  const legend = lines.map((line) => {
    const last = line.points[line.points.length - 1];
    return el("span", { title: `at step ${last[0]}: ${last[1]}` }, legendKey(line), `${line.label} ${Number.isInteger(last[1]) && Math.abs(last[1]) > 1 ? last[1] : num(last[1])}`);
  });
  return el("figure", { "data-chart": title }, el("figcaption", {}, title), picture, el("div", { class: "legend" }, legend));
}

// Dashed lines are told apart by their dashes where more than four share the colours.
function legendKey(line) {
  if (line.dots) return el("span", { class: "key dot", style: `background:${colour(line.index)}` });
  if (!line.dash) return el("span", { class: "key", style: `background:${colour(line.index)}` });
  return svg("svg", { viewBox: "0 0 20 4", class: "key" }, svg("line", { x1: 0, x2: 20, y1: 2, y2: 2, stroke: colour(line.index), "stroke-width": 2.5, "stroke-dasharray": DASH[line.dash % DASH.length] }));
}

function curvesView(run) {
  const found = charts(run);
  const summary = run.summary, held = summary && summary.heldout;
  const words = [];
  if (held && held.final) words.push(`held-out accuracy: sampled ${num(held.final.sampled)}, greedy ${num(held.final.greedy)}` + (held.start ? ` (before RL ${num(held.start.sampled)}, ${num(held.start.greedy)})` : ""));
  if (summary && !summary.valid) words.push("the run's start did not pass its validation, or that was skipped");
  words.push(...run.notes.map((note) => `not all was recorded: ${clean(note)}`));
  return el("section", {}, words.map((w) => el("p", {}, w)), follower.figure(run), found.length ? el("div", { class: "charts" }, found) : el("p", { class: "quiet" }, "No step has been reported yet."));
}
