// Which view is open, and following a live run.

const TABS = [["curves", "Curves"], ["steps", "Alignment"], ["rollouts", "Rollouts"], ["compare", "Before and after"], ["services", "Services"]];
const FOLLOW_MS = 2000;
const lines = new Lines();
let run = null, state = { tab: "curves" }, shown = null;

function readHash() {
  const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return TABS.some(([tab]) => tab === wanted.tab) ? wanted : { tab: "curves" };
}

// quiet: the view is already as the new state wants it; only the address follows.
function go(next, quiet = false) {
  state = next;
  const kept = Object.fromEntries(["tab", "role", "step", "id", "kind"].filter((n) => next[n] !== undefined).map((n) => [n, next[n]]));
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
  if (!quiet) draw();
}

function draw() {
  const views = { curves: () => curvesView(run), steps: () => stepsView(run, state, go), rollouts: () => rolloutsView(run, lines, state, go), services: () => servicesView(run), compare: () => beforeAfterView(run, lines, state, go) };
  document.getElementById("tabs").replaceChildren(...TABS.map(([tab, title]) => el("button", { type: "button", "data-tab": tab, "aria-current": tab === state.tab ? "page" : "false", onclick: () => go({ tab }) }, title)));
  shown = views[state.tab]();
  document.getElementById("view").replaceChildren(shown);
  if (state.tab === "curves") follower.look(run).catch(() => {}); // a server that is gone is named by follow()
}

function status(text) {
  const s = run.settings, steps = Math.max(0, ...Object.values(run.steps).map((list) => (list.length ? list[list.length - 1] + 1 : 0)));
  const reason = run.summary && run.summary.outcome === "failed" && run.summary.reason ? ` (${clean(run.summary.reason)})` : "";
  const state = run.live ? "running" : run.summary ? run.summary.outcome + reason : "not running";
  document.getElementById("status").textContent = text || `${clean(s.task)}, seed ${s.seed}: step ${steps} of ${s.steps}, ${state}; ${s.questions} questions × ${s.k} rollouts a step, agents ${s.roles.map(clean).join(", ")}`;
}

async function follow() {
  try {
    const next = await source.overview(lines.n);
    if (next) {
      const grown = next.rollouts.total > lines.n || !run || JSON.stringify(next.series) !== JSON.stringify(run.series);
      const first = run === null;
      run = next;
      lines.add(next.rollouts, run.settings.roles);
      document.getElementById("title").textContent = clean(run.title);
      status();
      if (first) draw();
      else if (grown && (state.tab === "curves" || state.tab === "services")) draw();
      else if (grown && shown && shown.grown) shown.grown();
    }
    if (run && state.tab === "curves") await follower.look(run);
  } catch (error) {
    if (run) status(`no answer from the server (${clean(error.message)}); what is shown may be old`);
    else document.getElementById("status").textContent = clean(error.message);
  }
  if (source.live) setTimeout(follow, FOLLOW_MS);
}

addEventListener("hashchange", () => { state = readHash(); if (run) draw(); });
state = readHash();
follow();
