// One rollout as a tree: the question, the main agent's turns, and inside them each invocation with its own turns and credit.

function treeView(tree) {
  const main = tree.trajectories.find((t) => t.role === "main");
  const calls = tree.trajectories.filter((t) => t.role !== "main");
  const tags = Object.entries(tree.tags).map(([name, value]) => `${clean(name)} ${clean(value)}`);
  const answers = tree.redacted ? [" answer and expected answer ", redactedText()] : [tree.answer || !tree.correct ? ` answer ${clean(tree.answer || "none")},` : "", tree.gold ? ` expected ${clean(tree.gold)}` : ""];
  const head = [
    el("h2", {}, tree.redacted ? redactedText() : folded(tree.question)),
    el("p", {}, outcomeLine(tree), tree.status === "ok" || tree.gold ? answers : null),
    el("p", { class: "quiet" }, [`${tree.split === "train" ? "rollout" : tree.split + ", " + tree.mode + ","} ${tree.id}, step ${tree.step}`, tree.question_id ? `question ${clean(tree.question_id)}` : "", ...tags].filter(Boolean).join(" · ")),
    toolSummary(tree),
  ];
  const stray = strayCalls(tree).map(toolLine);
  if (!main) return el("article", { class: "tree", "data-rollout": tree.id }, head, stray);
  const left = calls.slice();
  const tools = new Calls(tree, "main", main.invocation);
  const body = [];
  let turns = 0;
  for (const turn of main.turns) {
    const end = turn.from + turn.tokens;
    // An invocation stands after the last main token that existed when it was opened; its place may lie inside a turn.
    body.push(segmentLine(turn), turnLine("main", turn), turn.sampled ? tools.take(turns++) : []);
    while (left.length && left[0].opened_at !== null && left.some((c) => c.opened_at !== null && c.opened_at <= end)) {
      const next = left.findIndex((c) => c.opened_at !== null && c.opened_at <= end);
      body.push(callView(tree, left.splice(next, 1)[0]));
    }
  }
  return el("article", { class: "tree", "data-rollout": tree.id }, head, credit(main), main.turns.length ? null : notKept(tree), body.flat(), tools.rest(), left.map((call) => callView(tree, call)), stray);
}

const notKept = (tree) => el("p", { class: "quiet" }, tree.redacted ? "The question is secret: no text and no token of this rollout was recorded." : "The tokens of this step were not kept.");

const segmentLine = (turn) => turn.segment ? el("p", { class: "quiet", "data-segment": turn.segment }, `segment ${turn.segment}: the history as the program has it from here on`) : [];

function turnLine(who, turn) {
  const title = turn.sampled ? `${turn.tokens} sampled tokens, log-prob ${turn.logprob}` : `${turn.tokens} tokens it was given`;
  return el("div", { class: turn.sampled ? "turn sampled" : "turn", title }, el("span", { class: "who" }, turn.sampled ? who : "given"), folded(turn.text));
}

function callView(tree, call) {
  const c = call.credit;
  const value = c ? `reward ${num(c.reward)}, advantage ${signed(c.advantage, 3)}, ×${c.multiplicity}` : "";
  const tools = new Calls(tree, call.role, call.invocation);
  let turns = 0;
  const body = call.turns.flatMap((turn) => [segmentLine(turn), turnLine(call.role, turn), turn.sampled ? tools.take(turns++) : []]);
  return el("details", { class: "call", open: true, "data-call": `${call.role}/${call.invocation}` },
    el("summary", {}, el("strong", {}, `${call.role} ${call.invocation + 1}`), " ", el("span", { class: "quiet" }, value)),
    credit(call), body.flat(), tools.rest());
}

function credit(t) {
  const c = t.credit;
  const versions = t.versions[0] === t.versions[1] ? String(t.versions[0]) : `${t.versions[0]}–${t.versions[1]}`;
  const parts = t.parts.map((p) => fact(clean(p.name), `${p.score}, weight ${p.weight}`, `${num(p.score, 2)} × ${num(p.weight, 2)}`));
  if (t.gated) parts.push(fact("gate", "an invalid format (score 0) earns 0, whatever the other parts are", "invalid: 0"));
  const numbers = c ? [fact("reward", c.reward), fact("group mean", c.mean), fact("group std", c.std), fact("advantage", c.advantage, signed(c.advantage, 3)),
    !c.shared ? null : fact("shared prefix", c.shared, sharedWords(c)), fact("multiplicity", c.multiplicity, c.multiplicity ? `×${c.multiplicity}` : "dropped"), fact("weight", c.weight), fact("minibatch", c.minibatch + 1, String(c.minibatch + 1))] : [];
  return el("dl", { class: "facts" }, parts, numbers, fact("tokens", t.tokens, String(t.tokens)), fact("policy version", t.versions[0], versions));
}
