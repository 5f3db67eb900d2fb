// The services and tools of a run: what was asked, what failed, how long it took. Services count every request of every
// worker; tools are measured in each rollout that calls them.

const SERVICE = /^service\/([^/]+)\/(\w+)$/, TOOL = /^rollout\/tool\/([^/]+)\/(\w+)$/;

// name -> metric -> points
function named(run, form) {
  const found = new Map();
  for (const [name, points] of Object.entries(run.series)) {
    const match = form.exec(name);
    if (!match || !points.length) continue;
    if (!found.has(match[1])) found.set(match[1], {});
    found.get(match[1])[match[2]] = points;
  }
  return found;
}

const total = (points) => (points || []).reduce((sum, p) => sum + p[1], 0);
const lastOf = (points) => (points && points.length ? points[points.length - 1][1] : null);
const some = (points) => ((points || []).some((p) => p[1] > 0) ? points : []);
const count = (value) => Math.round(value).toLocaleString("en");

// At each step that has a report: above / below, 0 where nothing was below.
function ratio(above, below) {
  const at = new Map((above || []).map((p) => [p[0], p[1]]));
  return (below || []).filter((p) => p[1] > 0).map((p) => [p[0], (at.get(p[0]) || 0) / p[1], p[2]]);
}

// A counter that did not change is not reported: 0 at every other step with a call.
function filled(points, calls) {
  const at = new Map((points || []).map((p) => [p[0], p]));
  return points && points.length ? (calls || []).map((p) => at.get(p[0]) || [p[0], 0, p[2]]) : [];
}

const merged = (a, b) => {
  const at = new Map();
  for (const p of [...(a || []), ...(b || [])]) at.set(p[0], [p[0], (at.has(p[0]) ? at.get(p[0])[1] : 0) + p[1], p[2]]);
  return [...at.values()].sort((x, y) => x[0] - y[0]);
};

const cells = (row) => el("tr", {}, row.map(([text, bad, title], i) => el(i ? "td" : "th", { class: bad ? "bad" : "", title, scope: i ? null : "row" }, text)));

function serviceTable(services) {
  const head = ["service", "calls", "live", "cache", "replay", "recorded answers", "retries", "failures", "outages", "waited", "s a live call", "tokens in", "tokens out"];
  const rows = [...services].map(([name, m]) => {
    const sum = (counter) => total(m[counter]);
    const calls = sum("calls"), live = sum("live"), kept = sum("cache") + sum("replay");
    return [[clean(name)], [count(calls)], [count(live)], [count(sum("cache"))], [count(sum("replay"))], [calls ? `${Math.round((100 * kept) / calls)} %` : "–"], [count(sum("retries"))],
      [count(sum("failures")), sum("failures") > 0], [count(sum("outages")), sum("outages") > 0], [sum("waited") ? `${count(sum("waited"))} s` : "–", sum("waited") > 0, "summed over calls"],
      [live ? num(sum("seconds") / live) : "–"], [m.tokens_in ? count(sum("tokens_in")) : "–"], [m.tokens_out ? count(sum("tokens_out")) : "–"]];
  });
  return el("div", { class: "scroll" }, el("table", { class: "numbers", id: "services" }, el("thead", {}, el("tr", {}, head.map((h) => el("th", {}, h)))), el("tbody", {}, rows.map(cells))));
}

function toolTable(tools) {
  const head = ["tool", "at step", "calls a rollout", "retries a rollout", "failures a rollout", "seconds: median", "p95", "mean"];
  const rows = [...tools].map(([name, m]) => {
    const points = m.calls || Object.values(m)[0], failures = lastOf(m.failures);
    return [[clean(name)], [String(points[points.length - 1][0])], ...["calls", "retries"].map((k) => [num(lastOf(m[k]), 2)]), [num(failures, 2), failures > 0], ...["seconds_median", "seconds_p95", "seconds"].map((k) => [num(lastOf(m[k])), false, lastOf(m[k])])];
  });
  return el("div", { class: "scroll" }, el("table", { class: "numbers", id: "tools" }, el("thead", {}, el("tr", {}, head.map((h) => el("th", {}, h)))), el("tbody", {}, rows.map(cells))));
}

function serviceCharts(services, tools) {
  const per = (among, points) => [...among].map(([name, m], i) => ({ label: clean(name), index: i, dash: Math.floor(i / 4), points: points(m) }));
  const seconds = [...tools].flatMap(([name, m], i) => [{ label: `${clean(name)}, median`, index: i, points: m.seconds_median }, { label: `${clean(name)}, p95`, index: i, dash: 1, points: m.seconds_p95 }]);
  return [
    ["seconds of a tool call", seconds],
    ["tool calls a rollout", per(tools, (m) => m.calls)],
    ["further attempts at tool calls, a rollout", per(tools, (m) => some(m.retries))],
    ["failed tool calls a rollout", per(tools, (m) => some(m.failures))],
    ["requests to services", per(services, (m) => m.calls)],
    ["share of requests with a recorded answer", per(services, (m) => ratio(merged(m.cache, m.replay), m.calls)), [0, 1]],
    ["further attempts at requests", per(services, (m) => filled(m.retries, m.calls))],
    ["failed requests", per(services, (m) => filled(m.failures, m.calls))],
    ["seconds of a live request, mean", per(services, (m) => ratio(m.seconds, m.live))],
    ["seconds that calls waited for a service that was down", per(services, (m) => filled(m.waited, m.calls))],
  ].map(([title, lines, range]) => chart(title, lines.filter((line) => line.points && line.points.length), range)).filter(Boolean);
}

function servicesView(run) {
  const services = named(run, SERVICE), tools = named(run, TOOL);
  if (!services.size && !tools.size) return el("p", { class: "quiet" }, "No tool call has been reported.");
  return el("section", {},
    services.size ? [el("h2", {}, "Services"), el("p", { class: "quiet" }, "All requests of the run. Recorded answers came from the cassette or from the same request of another rollout that was under way."), serviceTable(services)] : null,
    tools.size ? [el("h2", {}, "Tools"), el("p", { class: "quiet" }, "Of the rollouts that called them, in the last report of a worker; retries are those that the tool call itself made."), toolTable(tools)] : null,
    el("h2", {}, "Over the steps"), el("div", { class: "charts" }, serviceCharts(services, tools)));
}
