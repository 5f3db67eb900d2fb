// The alignment of one step as a picture: every group, every rollout, every invocation, how often it counts and for what.

function tint(advantage, scale) {
  if (advantage === null) return "transparent";
  const share = Math.round(Math.min(1, Math.abs(advantage) / (scale || 1)) * 70);
  return advantage === 0 ? "var(--page)" : `color-mix(in srgb, ${advantage > 0 ? "var(--good)" : "var(--bad)"} ${share}%, var(--page))`;
}

// A row's last token does not enter the model, so this is all that can be shared of one.
const entering = (c) => Math.max(1, c.length - 1);
const sharedWords = (c) => `${whole(c.shared)} of ${whole(c.length)} tokens`;

function tokensFact(tokens) {
  if (!tokens) return null;
  const all = tokens.computed + tokens.shared;
  return fact("prefixes", tokens.shared, `${whole(tokens.shared)} of ${whole(all)} tokens shared (${num(100 * tokens.shared / all, 1)} %), computed ${whole(tokens.computed)}`);
}

function stepsView(run, state, go) {
  const roles = run.settings.roles.filter((role) => run.steps[role] && run.steps[role].length);
  if (!roles.length) return el("p", { class: "quiet" }, "No step is in the record yet.");
  const role = roles.includes(state.role) ? state.role : roles[Math.min(1, roles.length - 1)];
  const steps = run.steps[role];
  const step = steps.includes(Number(state.step)) ? Number(state.step) : steps[steps.length - 1];
  const place = el("div", {}, el("p", { class: "quiet" }, "…"));
  const at = steps.indexOf(step);
  const move = (to) => go({ tab: "steps", role, step: steps[to] });
  const controls = el("form", { onsubmit: (e) => e.preventDefault() },
    el("label", {}, "agent", el("select", { name: "role", onchange: (e) => go({ tab: "steps", role: e.target.value, step }) }, roles.map((r) => el("option", { value: r, selected: r === role }, r)))),
    el("label", {}, "step (from 0)", el("input", { type: "number", name: "step", value: step, min: steps[0], max: steps[steps.length - 1], onchange: (e) => go({ tab: "steps", role, step: e.target.value }) })),
    el("button", { type: "button", disabled: at === 0, onclick: () => move(at - 1) }, "‹ earlier"),
    el("button", { type: "button", disabled: at === steps.length - 1, onclick: () => move(at + 1) }, "later ›"));
  source.step(role, step).then((data) => place.replaceChildren(alignment(data, go)), (error) => place.replaceChildren(el("p", { class: "bad" }, clean(error.message))));
  return el("section", {}, controls, place);
}

function alignment(data, go) {
  const cells = data.groups.flatMap((g) => g.rollouts.flatMap((r) => r.invocations));
  const scale = Math.max(1e-9, ...cells.map((c) => Math.abs(c.advantage || 0)));
  const kept = cells.filter((c) => c.multiplicity > 0);
  const copies = kept.reduce((n, c) => n + c.multiplicity - 1, 0);
  const empty = data.groups.reduce((n, g) => n + g.rollouts.filter((r) => !r.failed && !r.invocations.length).length, 0);
  const failed = data.groups.reduce((n, g) => n + g.rollouts.filter((r) => r.failed).length, 0);
  const facts = el("dl", { class: "facts free" },
    fact("trajectories", cells.length, String(cells.length)), fact("kept", kept.length, String(kept.length)), fact("copies", copies, String(copies)),
    fact("dropped", cells.length - kept.length, String(cells.length - kept.length)), fact("rollouts without", empty, String(empty)), fact("failed", failed, String(failed)),
    fact("mode", data.mode, `${data.mode}, D_max ${data.d_max}`), data.minibatches.map((d, i) => fact(`denominator ${i + 1}`, d, num(d, 1))),
    tokensFact(data.tokens),
    ["loss/pg", "policy/grad_norm", "loss/clip_ratio_high", "policy/entropy"].filter((n) => n in data.metrics).map((n) => fact(n, data.metrics[n], num(data.metrics[n], 4))));
  const legend = el("p", { class: "quiet" }, "A box is one trajectory: its advantage, and ×n where the alignment counts it n times; the wider, the more of its rollout's weight it holds. Green is above its group's mean, red below; dashed was dropped. ✓ marks a correct rollout, – one without this agent, ✕ a failed one.");
  const shares = cells.some((c) => c.shared > 0);
  const bars = shares ? el("p", { class: "quiet", id: "bars" }, "The bar in a box is its tokens: ", el("span", { class: "key box hatched" }), "computed once, shared with another trajectory that begins alike; ", el("span", { class: "key box" }), "not shared.") : null;
  return el("div", {}, facts, legend, bars, data.groups.map((group) => el("div", { class: "group", "data-query": group.query },
    el("div", {}, el("strong", {}, group.redacted ? redactedText() : clean(group.question)), " ", el("span", { class: "quiet", title: `mean ${group.mean}, std ${group.std}` }, `group ${group.query}: mean ${num(group.mean)}, std ${num(group.std)}${shares ? `, ${whole(sharedOf(group))} tokens shared` : ""}`)),
    el("div", { class: "lanes" }, group.rollouts.map((rollout, k) => lane(rollout, k, scale, shares, go))))));
}

const sharedOf = (group) => group.rollouts.reduce((n, r) => n + r.invocations.reduce((m, c) => m + c.shared, 0), 0);

// The part of a trajectory that was computed for another one, hatched: it is seen without colours, too.
function tokenBar(c) {
  return el("span", { class: "tokens", "data-shared": c.shared }, c.shared > 0 && el("span", { class: "hatched", style: `width:${num(100 * Math.min(1, c.shared / entering(c)), 1)}%` }));
}

function lane(rollout, k, scale, shares, go) {
  const mark = rollout.failed ? "✕" : rollout.correct ? "✓" : "";
  const open = () => go({ tab: "rollouts", id: rollout.id });
  const boxes = rollout.invocations.map((c) => el("button", {
    class: c.multiplicity ? "cell" : "cell dropped", type: "button", onclick: open, "data-weight": c.weight,
    style: `background:${tint(c.advantage, scale)};min-width:${Math.round(22 + 30 * Math.min(1, c.weight))}px`,
    title: `invocation ${c.invocation}: reward ${c.reward}, advantage ${c.advantage}, copies ${c.multiplicity}, weight ${c.weight}, ${c.length} tokens, minibatch ${c.minibatch + 1}` + (shares ? `, ${sharedWords(c)} shared` : ""),
  }, c.multiplicity ? signed(c.advantage, 1) + (c.multiplicity > 1 ? ` ×${c.multiplicity}` : "") : num(c.reward, 1), shares && c.multiplicity ? tokenBar(c) : null));
  return el("div", { class: "lane" }, el("span", { class: "k" }, `k=${k} `, el("span", { class: rollout.failed ? "bad" : "good" }, mark)), boxes.length ? boxes : rollout.failed ? null : "–");
}
