// The list of rollouts with its filters, and the same question before and after training.

const PAGE_ROWS = 50;

class Lines {
  // The columns of the overview, appended to as a live run goes on. A question's text is held once.
  constructor() { this.n = 0; this.rows = []; }
  add(part, roles) {
    const text = part.texts.map(String);
    for (let i = 0; i < part.id.length; i++) {
      const row = { id: part.id[i], question: text[part.text[i]], gold: text[part.gold[i]], answer: text[part.answer[i]], step: part.step[i], split: text[part.split[i]], mode: text[part.mode[i]], ok: part.ok[i], correct: part.correct[i], tokens: part.tokens[i], failed_by: text[part.failed_by[i]], tool_errors: part.tool_errors[i], redacted: part.redacted[i], d_k: {}, reward: {}, advantage: {} };
      for (const role of roles) {
        row.d_k[role] = role === "main" ? 1 : part.d_k[role][i];
        row.reward[role] = part.reward[role][i];
        row.advantage[role] = part.advantage[role][i];
      }
      this.rows.push(row);
    }
    this.n = part.total;
  }
}

function matches(row, f, role) {
  if (f.split && row.split !== f.split) return false;
  if (f.status === "correct" && !(row.ok && row.correct > 0)) return false;
  if (f.status === "wrong" && !(row.ok && row.correct === 0)) return false;
  if (f.status === "failed" && row.ok) return false;
  if (f.failure && !failuresOf(row).includes(f.failure)) return false;
  if (f.from !== "" && row.step < Number(f.from)) return false;
  if (f.to !== "" && row.step > Number(f.to)) return false;
  if (f.low !== "" && !(row.reward[role] !== null && row.reward[role] >= Number(f.low) - 1e-9)) return false;
  if (f.high !== "" && !(row.reward[role] !== null && row.reward[role] <= Number(f.high) + 1e-9)) return false;
  if (f.called && role !== "main" && !(row.d_k[role] > 0)) return false;
  const words = f.q.toLowerCase().split(/\s+/).filter(Boolean);
  return !words.length || words.every((w) => `${row.id} ${row.question} ${row.answer} ${row.gold}`.toLowerCase().includes(w));
}

const EMPTY_FILTER = { split: "", status: "", failure: "", from: "", to: "", low: "", high: "", called: false, q: "", role: "" };

function rolloutsView(run, lines, state, go) {
  const roles = run.settings.roles;
  const trained = lines.rows.some((row) => row.split === "train");
  const f = { ...EMPTY_FILTER, split: trained ? "train" : "", ...(state.filter || {}) };
  const role = roles.includes(f.role) ? f.role : roles[roles.length - 1];
  const splits = [...new Set(lines.rows.map((row) => row.split))].sort();
  const list = el("div"), tree = el("div", { class: "pane" }), kinds = el("p", { class: "kinds", id: "kinds" });
  let page = 0;
  const filterNow = () => lines.rows.filter((row) => matches(row, f, role));
  function show() {
    const found = filterNow();
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    page = Math.min(page, pages - 1);
    const rows = found.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS);
    const turn = (to) => { page = to; show(); };
    kinds.replaceChildren(...failureButtons(run, lines.rows.filter((row) => matches(row, { ...f, failure: "" }, role)), f.failure, (kind) => set("failure", kind)));
    list.replaceChildren(
      el("p", { class: "quiet", id: "count" }, `${found.length} of ${lines.rows.length} rollouts`),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["rollout", "question", "outcome", `${role} reward`, "advantage", "calls", "tokens"].map((h) => el("th", {}, h)))),
        el("tbody", {}, rows.map((row) => line(row, role, state.id, (id) => open(id)))))),
      el("div", { class: "pager" }, el("button", { disabled: page === 0, onclick: () => turn(page - 1) }, "‹ previous"), `page ${page + 1} of ${pages}`, el("button", { disabled: page >= pages - 1, onclick: () => turn(page + 1) }, "next ›")));
  }
  function open(id) {
    state.id = id;
    go({ ...state, tab: "rollouts", id }, true);
    showTree(tree, id);
    for (const tr of list.querySelectorAll("tr[data-id]")) tr.setAttribute("aria-selected", tr.dataset.id === id);
    if (matchMedia("(max-width: 800px)").matches) tree.scrollIntoView(); // there it stands above the list
  }
  const set = (name, value) => { f[name] = value; state.filter = f; page = 0; name === "role" ? go({ ...state, tab: "rollouts" }) : show(); };
  const input = (name, label, attributes) => el("label", {}, label, el("input", { name, value: f[name], oninput: (e) => set(name, e.target.value), ...attributes }));
  const pick = (name, label, options, value) => el("label", {}, label, el("select", { name, onchange: (e) => set(name, e.target.value) }, options.map(([v, t]) => el("option", { value: v, selected: v === value }, t))));
  const form = el("form", { onsubmit: (e) => e.preventDefault() },
    input("q", "search", { type: "search", placeholder: "words of a question, an answer, an id" }),
    pick("role", "agent", roles.map((r) => [r, r]), role), pick("status", "status", [["", "all"], ["correct", "correct"], ["wrong", "wrong"], ["failed", "failed"]], f.status),
    pick("split", "split", [["", "all"], ...splits.map((s) => [s, s])], f.split),
    el("label", {}, "with a call of it", el("input", { type: "checkbox", name: "called", checked: f.called, onchange: (e) => set("called", e.target.checked) })),
    input("low", "reward from", { type: "number", step: "any" }), input("high", "reward to", { type: "number", step: "any" }),
    input("from", "step from", { type: "number" }), input("to", "step to", { type: "number" }));
  show();
  if (state.id) showTree(tree, state.id); else tree.append(el("p", { class: "quiet" }, "Choose a rollout to see its tree."));
  const view = el("section", {}, form, kinds, el("div", { class: "split" }, list, tree));
  view.grown = show;
  return view;
}

function line(row, role, selected, open) {
  const errors = row.tool_errors ? el("span", { class: "bad", title: FAILURE_WORDS.tool_error }, ` ${row.tool_errors} tool error${row.tool_errors > 1 ? "s" : ""}`) : null;
  const kind = failuresOf(row)[0];
  const outcome = !row.ok ? el("td", { class: "bad", title: `failed: ${FAILURE_WORDS[kind]}` }, kind === "unknown" ? "✕ failed" : `✕ ${kind}`) : row.correct ? el("td", { class: "outcome" }, el("span", { class: "good" }, "correct"), errors) : el("td", { class: "outcome" }, "wrong", errors);
  const calls = Object.entries(row.d_k).filter(([r]) => r !== "main").map(([, d]) => d).join(" + ");
  return el("tr", { "data-id": row.id, tabindex: 0, "aria-selected": row.id === selected, onclick: () => open(row.id), onkeydown: (e) => { if (e.key === "Enter") open(row.id); } },
    el("td", {}, row.id), el("td", { class: "text" }, row.redacted ? redactedText() : clean(row.question)), outcome, el("td", {}, num(row.reward[role])), el("td", {}, signed(row.advantage[role])), el("td", {}, calls), el("td", {}, String(row.tokens)));
}

// Failures by kind among what the other filters leave, each a filter.
function failureButtons(run, rows, chosen, choose) {
  const counts = new Map();
  for (const row of rows) for (const kind of failuresOf(row)) counts.set(kind, (counts.get(kind) || 0) + 1);
  const buttons = Object.keys(FAILURES).filter((kind) => kind !== "unknown" || counts.get(kind)).map((kind) => el("button", { type: "button", "data-kind": kind, "aria-pressed": String(kind === chosen), title: FAILURE_WORDS[kind], disabled: !counts.get(kind) && kind !== chosen, onclick: () => choose(kind === chosen ? "" : kind) }, `${FAILURES[kind]} ${counts.get(kind) || 0}`));
  const fatal = run.summary && run.summary.outcome === "failed" && run.summary.reason;
  return [el("span", { class: "quiet" }, "failures by kind"), ...buttons, fatal ? el("span", { class: "bad", "data-kind": "fatal" }, `fatal: ${clean(fatal)}`) : null].filter(Boolean);
}

function showTree(place, id) {
  place.dataset.wanted = id;
  place.classList.add("chosen");
  return source.rollout(id).then((tree) => { if (place.dataset.wanted === id) place.replaceChildren(treeView(tree)); },
    (error) => { if (place.dataset.wanted === id) place.replaceChildren(el("p", { class: "bad" }, clean(error.message))); });
}

// The same question of an evaluation at the first and at the last step that was evaluated.
function beforeAfterView(run, lines, state, go) {
  const evaluations = lines.rows.filter((row) => row.split !== "train");
  const kinds = [...new Set(evaluations.map((row) => `${row.split}, ${row.mode}`))].sort();
  if (!kinds.length) return el("p", { class: "quiet" }, "No evaluation is in the record.");
  const kind = kinds.includes(state.kind) ? state.kind : kinds.find((k) => k.endsWith("greedy")) || kinds[0];
  const mine = evaluations.filter((row) => `${row.split}, ${row.mode}` === kind);
  const steps = [...new Set(mine.map((row) => row.step))].sort((a, b) => a - b);
  const before = steps[0], after = steps[steps.length - 1];
  const pairs = new Map();
  // Of secret questions the record has no text; the fifth part of an evaluation's id is the question's number.
  const key = (row) => (row.redacted ? `#${row.id.split("/")[4]}` : row.question);
  for (const row of mine) if (row.step === before || row.step === after) pairs.set(key(row), { ...(pairs.get(key(row)) || {}), [row.step]: row });
  const both = [...pairs.values()].filter((p) => p[before] && p[after]);
  const panes = [el("div", { class: "pane", id: "before" }), el("div", { class: "pane", id: "after" })];
  const open = (pair) => [before, after].forEach((step, i) => showTree(panes[i], pair[step].id));
  const word = (row) => el("td", { class: row.correct ? "good" : "" }, row.ok ? (row.correct ? "correct" : "wrong") : "failed", row.answer ? ` (${clean(row.answer)})` : "");
  const table = el("table", {}, el("thead", {}, el("tr", {}, ["question", `step ${before}`, `step ${after}`].map((h) => el("th", {}, h)))),
    el("tbody", {}, both.map((pair) => el("tr", { tabindex: 0, onclick: () => open(pair), onkeydown: (e) => { if (e.key === "Enter") open(pair); } }, el("td", { class: "text" }, pair[before].redacted ? [redactedText(), ` question ${pair[before].id.split("/")[4]}`] : clean(pair[before].question)), word(pair[before]), word(pair[after])))));
  const share = (step) => both.filter((p) => p[step].correct > 0).length;
  if (both.length) open(both.find((p) => p[after].correct > p[before].correct) || both[0]);
  return el("section", {}, el("form", { onsubmit: (e) => e.preventDefault() }, el("label", {}, "questions", el("select", { name: "kind", onchange: (e) => go({ tab: "compare", kind: e.target.value }) }, kinds.map((k) => el("option", { selected: k === kind }, k))))),
    el("p", { class: "quiet" }, `${both.length} questions that were kept of both evaluations: ${share(before)} correct at step ${before}, ${share(after)} at step ${after}`),
    el("div", { class: "scroll", style: "max-height: 16em" }, table), el("div", { class: "split" }, panes));
}
