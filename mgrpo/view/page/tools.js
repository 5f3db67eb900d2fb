// What agents did with their tools and how it was judged: a line for each call, at the turn that made it.

const LONG = 900, HEAD = 500; // characters of a text that is folded, and of what is shown of it
const STATUS_CLASS = { ok: "good", empty: "warn", tool_error: "bad" };
const STATUS_WORD = { tool_error: "tool error" };
const FAILURES = { tool_error: "tool errors", infrastructure: "infrastructure", length: "length", deadline: "deadline", task: "task", unknown: "kind not recorded" };
const FAILURE_WORDS = {
  tool_error: "an agent's call was wrong or led nowhere: it reads the error and learns from it, the rollout counts",
  infrastructure: "an engine, a tool's service or a judge did not answer: the rollout left its group and is not scored",
  length: "a trajectory outgrew its max_length",
  deadline: "it took longer than rollout.deadline",
  task: "the task's code raised an error, or the rollout could not be trained on",
  unknown: "the record was written before kinds were kept",
};

// The kinds of failure that a line of the list stands for: that of a failed rollout, or errors that its agents read.
function failuresOf(row) {
  if (!row.ok) return [row.failed_by in FAILURES ? row.failed_by : "unknown"];
  return row.tool_errors > 0 ? ["tool_error"] : [];
}

const redactedText = () => el("span", { class: "redacted", title: "the question is secret: its texts and tokens are not recorded" }, "redacted");

// A long text: its beginning, and the rest on demand.
function folded(text) {
  const shown = clean(text);
  if (shown.length <= LONG) return el("span", { class: "said" }, shown);
  const cut = /[\ud800-\udbff]/.test(shown[HEAD - 1]) ? HEAD - 1 : HEAD;
  return el("span", {}, el("span", { class: "said" }, shown.slice(0, cut)), el("details", { class: "more" }, el("summary", {}, `${(shown.length - cut).toLocaleString("en")} more characters`), el("span", { class: "said" }, shown.slice(cut))));
}

function toolLine(call) {
  const status = call.status || "unknown";
  const seconds = call.seconds === null ? null : el("span", { title: `${call.seconds} seconds` }, `${call.seconds < 0.0005 ? "0" : num(call.seconds, 3)} s`);
  return el("div", { class: `tool ${STATUS_CLASS[status] || ""}`, "data-status": status },
    el("span", { class: "badge" }, STATUS_WORD[status] || clean(status)), el("strong", {}, call.tool ? clean(call.tool) : redactedText()), " ",
    call.arguments ? el("code", {}, folded(call.arguments)) : null,
    el("span", { class: "facts" }, call.source ? el("span", { class: `source ${clean(call.source)}` }, clean(call.source)) : null, seconds,
      call.chars === null ? null : el("span", { title: "characters of what was observed" }, `${call.chars.toLocaleString("en")} chars`),
      call.digest ? el("span", { class: "digest", title: `digest of what was observed: ${clean(call.digest)}` }, clean(call.digest).slice(0, 8)) : null));
}

// Calls of one agent by the number of its turn. take(n): those of turn n; rest(): those of turns that are not shown.
class Calls {
  constructor(tree, role, invocation) {
    this.left = tree.tools.filter((call) => call.role === role && call.invocation === invocation);
  }
  take(turn) {
    const found = this.left.filter((call) => call.turn === turn);
    this.left = this.left.filter((call) => call.turn !== turn);
    return found.map(toolLine);
  }
  rest() {
    const turns = [...new Set(this.left.map((call) => call.turn))];
    return turns.map((turn) => el("div", { class: "late" }, turn === null ? null : el("span", { class: "quiet" }, `turn ${turn + 1}`), this.take(turn)));
  }
}

// Calls that belong to no trajectory of the tree.
function strayCalls(tree) {
  const known = new Set(tree.trajectories.map((t) => `${t.role}/${t.invocation}`));
  return tree.tools.filter((call) => !known.has(`${call.role}/${call.invocation}`));
}

// Correct or wrong, and who found so: the rule's score, the judge's word.
function outcomeLine(tree) {
  if (tree.status !== "ok") {
    const kind = tree.failed_by in FAILURES ? tree.failed_by : "unknown";
    return el("span", { class: "bad", "data-outcome": kind, title: FAILURE_WORDS[kind] }, `failed${kind === "unknown" ? "" : ` (${kind})`}: `, folded(tree.failure || "no reason was recorded"));
  }
  const parts = [el("span", { class: tree.correct ? "good" : "bad", "data-outcome": tree.correct ? "correct" : "wrong" }, tree.correct === null ? "no outcome" : tree.correct > 0 && tree.correct < 1 ? `${num(tree.correct, 2)} correct` : tree.correct ? "correct" : "wrong")];
  const v = tree.verdict;
  if (v && (v.rule || v.rule_score !== null)) parts.push(el("span", { class: "verdict", title: `score ${v.rule_score}` }, `rule ${clean(v.rule)}: ${num(v.rule_score, 2)}`));
  if (v && v.judge) parts.push(el("span", { class: "verdict" }, "judge: ", el("span", { class: v.judge === "correct" ? "good" : "bad" }, clean(v.judge)), v.source ? ` (${clean(v.source)})` : ""));
  if (v && v.digest) parts.push(el("span", { class: "digest", title: `digest of the scorer: ${clean(v.digest)}` }, clean(v.digest).slice(0, 8)));
  return el("span", { class: "outcome" }, parts);
}

// How many of the listed calls had each status, by tool.
function toolSummary(tree) {
  if (!tree.tools.length) return null;
  const count = new Map();
  for (const call of tree.tools) {
    const known = count.get(call.tool) || { all: 0 };
    known.all += 1;
    known[call.status] = (known[call.status] || 0) + 1;
    count.set(call.tool, known);
  }
  const facts = [...count].map(([tool, n]) => el("div", {}, el("dt", {}, tool ? clean(tool) : redactedText()), el("dd", {}, `${n.all}`, ["empty", "tool_error"].filter((s) => n[s]).map((s) => el("span", { class: STATUS_CLASS[s] }, ` ${n[s]} ${STATUS_WORD[s] || s}`)))));
  return el("dl", { class: "facts free", "data-tools": tree.tools.length }, el("div", {}, el("dt", {}, "tool calls"), el("dd", {}, String(tree.tools.length))), facts);
}
