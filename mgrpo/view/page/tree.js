// One rollout as a tree: the question, the main agent's turns, and inside them each invocation with its own turns and credit.

function treeView(tree) {
  const main = tree.trajectories.find((t) => t.role === "main");
  const calls = tree.trajectories.filter((t) => t.role !== "main");
  const verdict = tree.status !== "ok" ? el("span", { class: "bad" }, `failed: ${clean(tree.failure)}`) : tree.correct ? el("span", { class: "good" }, "correct") : el("span", { class: "bad" }, "wrong");
  const head = [
    el("h2", {}, clean(tree.question)),
    el("p", {}, verdict, tree.answer || !tree.correct ? ` answer ${clean(tree.answer || "none")},` : "", tree.gold ? ` expected ${clean(tree.gold)}` : ""),
    el("p", { class: "quiet" }, `${tree.split === "train" ? "rollout" : tree.split + ", " + tree.mode + ","} ${tree.id}, step ${tree.step}`),
  ];
  if (!main) return el("article", { class: "tree" }, head);
  const left = calls.slice();
  const body = [];
  for (const turn of main.turns) {
    const end = turn.from + turn.tokens;
    // An invocation stands after the last main token that existed when it was opened; its place may lie inside a turn.
    body.push(turnLine("main", turn));
    while (left.length && left[0].opened_at !== null && left.some((c) => c.opened_at !== null && c.opened_at <= end)) {
      const next = left.findIndex((c) => c.opened_at !== null && c.opened_at <= end);
      body.push(callView(left.splice(next, 1)[0]));
    }
  }
  return el("article", { class: "tree", "data-rollout": tree.id }, head, credit(main), main.turns.length ? null : el("p", { class: "quiet" }, "The tokens of this step were not kept."), body, left.map(callView));
}

function turnLine(who, turn) {
  const title = turn.sampled ? `${turn.tokens} sampled tokens, log-prob ${turn.logprob}` : `${turn.tokens} tokens it was given`;
  return el("div", { class: turn.sampled ? "turn sampled" : "turn", title }, el("span", { class: "who" }, turn.sampled ? who : "given"), el("span", { class: "said" }, clean(turn.text)));
}

function callView(call) {
  const c = call.credit;
  const value = c ? `reward ${num(c.reward)}, advantage ${signed(c.advantage, 3)}, ×${c.multiplicity}` : "";
  return el("details", { class: "call", open: true, "data-call": `${call.role}/${call.invocation}` },
    el("summary", {}, el("strong", {}, `${call.role} ${call.invocation + 1}`), " ", el("span", { class: "quiet" }, value)),
    credit(call), call.turns.map((turn) => turnLine(call.role, turn)));
}

function credit(t) {
  const c = t.credit;
  const versions = t.versions[0] === t.versions[1] ? String(t.versions[0]) : `${t.versions[0]}–${t.versions[1]}`;
  const parts = t.parts.map((p) => fact(clean(p.name), `${p.score}, weight ${p.weight}`, `${num(p.score, 2)} × ${num(p.weight, 2)}`));
  if (t.gated) parts.push(fact("gate", "an invalid format (score 0) earns 0, whatever the other parts are", "invalid: 0"));
  const numbers = c ? [fact("reward", c.reward), fact("group mean", c.mean), fact("group std", c.std), fact("advantage", c.advantage, signed(c.advantage, 3)),
    fact("multiplicity", c.multiplicity, c.multiplicity ? `×${c.multiplicity}` : "dropped"), fact("weight", c.weight), fact("minibatch", c.minibatch + 1, String(c.minibatch + 1))] : [];
  return el("dl", { class: "facts" }, parts, numbers, fact("tokens", t.tokens, String(t.tokens)), fact("policy version", t.versions[0], versions));
}
