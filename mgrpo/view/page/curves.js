// Curves per agent: small multiples, one quantity each, the same colour for the same agent everywhere.

const colour = (index) => `var(--c${index % 4})`;
const DASH = ["", "5 3", "2 3", "8 3 2 3"];

function charts(run) {
  const roles = run.settings.roles;
  const perRole = (name, among = roles) => among.map((role) => ({ label: role, index: roles.indexOf(role), points: run.series[`${role}/${name}`] }));
  const accuracy = ["validation", "heldout"].flatMap((split, i) => ["sampled", "greedy"].map((mode, j) => ({ label: `${split}, ${mode}`, index: j, dash: i, dots: i === 1, points: run.series[`eval/${split}/${mode}`] })));
  const sets = Object.keys(run.series).filter((n) => /^eval\/[^/]+\/avg$/.test(n)).map((n) => n.split("/")[1]);
  accuracy.push(...sets.map((name, i) => ({ label: `${name}, avg`, index: i + 2, dash: 2, points: run.series[`eval/${name}/avg`] })));
  const subs = roles.slice(1);
  const own = [...new Set(Object.keys(run.series).map((n) => n.split("/")).filter((n) => n[1] === "task").map((n) => n[2]))].sort();
  const ofTask = (name) => [...perRole(`task/${name}`), { label: "rollout", index: 0, dash: 1, points: run.series[`rollout/task/${name}`] }];
  return [
    ["accuracy on questions never trained on", accuracy, [0, 1]],
    ["mean reward", perRole("reward/mean")],
    ["share of correct answers in training", [{ label: "correct", index: 0, points: run.series["main/reward/correct"] }], [0, 1]],
    ["invocations per rollout, d_k", perRole("d_k/mean", subs)],
    ["entropy of the policy, nats", perRole("policy/entropy")],
    ["tokens whose ratio was clipped above", perRole("loss/clip_ratio_high")],
    ["trajectories with advantage 0", perRole("advantage/frac_zero")],
    ["gradient norm", perRole("policy/grad_norm")],
    ["copies among the aligned", perRole("align/dup_ratio", subs)],
    ["dropped by the alignment", perRole("align/drop_ratio", subs)],
    ["sampled tokens per second", [{ label: "all agents", index: 0, points: run.series["rollout/perf/tok_per_s"] }]],
    ["seconds per step", perRole("time/step")],
    ["share of the rollout places that were busy", [{ label: "all agents", index: 0, points: run.series["rollout/perf/busy"] }], [0, 1]],
    ["weights sent, share of a whole version", perRole("weights/share")],
    ["share of a step that its trainer waited", perRole("perf/idle"), [0, 1]],
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
  for (const t of ticks(x0, x1, 6)) picture.append(svg("text", { x: x(t), y: H - 8, "text-anchor": "middle" }, String(+t.toPrecision(6))));
  for (const line of lines) {
    const at = line.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    if (!line.dots) picture.append(svg("polyline", { points: at.join(" "), fill: "none", stroke: colour(line.index), "stroke-width": 1.8, "stroke-dasharray": DASH[line.dash || 0] }));
    if (line.dots || line.points.length < 25) for (const p of line.points) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: line.dots ? 4 : 2.5, fill: colour(line.index) }, svg("title", {}, `${line.label}, step ${p[0]}: ${p[1]}`)));
  }
  const legend = lines.map((line) => {
    const last = line.points[line.points.length - 1];
    return el("span", { title: `at step ${last[0]}: ${last[1]}` }, el("span", { class: line.dots ? "key dot" : "key", style: `background:${colour(line.index)}` }), `${line.label} ${num(last[1])}`);
  });
  return el("figure", { "data-chart": title }, el("figcaption", {}, title), picture, el("div", { class: "legend" }, legend));
}

function curvesView(run) {
  const found = charts(run);
  const summary = run.summary, held = summary && summary.heldout;
  const words = [];
  if (held && held.final) words.push(`held-out accuracy: sampled ${num(held.final.sampled)}, greedy ${num(held.final.greedy)}` + (held.start ? ` (before RL ${num(held.start.sampled)}, ${num(held.start.greedy)})` : ""));
  if (summary && !summary.valid) words.push("the run's start did not pass its validation, or that was skipped");
  words.push(...run.notes.map((note) => `not all was recorded: ${clean(note)}`));
  return el("section", {}, words.map((w) => el("p", {}, w)), timelineFigure(run), found.length ? el("div", { class: "charts" }, found) : el("p", { class: "quiet" }, "No step has been reported yet."));
}
