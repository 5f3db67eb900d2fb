// Elements, numbers, text, and where the data comes from. Text only ever enters the page as text nodes.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Control and direction characters become visible signs: they must not reorder or hide what stands beside them.
function clean(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) => {
    const code = c.charCodeAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}

function num(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && digits !== 3) return String(value);
  return Number(value).toFixed(digits);
}
const whole = (value) => Math.round(value).toLocaleString("en");
const signed = (value, digits = 2) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + value.toFixed(digits));

// A number as it was recorded stands in the title; the page shows it rounded.
const fact = (name, value, text) => el("div", { title: value === null || value === undefined ? "" : `${name} ${value}` }, el("dt", {}, name), el("dd", { "data-fact": name }, text === undefined ? num(value) : text));

class Exported {
  constructor(data) { this.data = data; this.live = false; }
  async overview(have) { return have ? null : this.data.overview; }
  async timeline() { return this.data.timeline; }
  async step(role, step) { return this.data.steps[`${role}/${step}`]; }
  has(id) { return Object.hasOwn(this.data.rollouts, id); }
  async rollout(id) {
    if (!(id in this.data.rollouts)) throw new Error("the tree of this rollout is not in the exported file");
    return this.data.rollouts[id];
  }
}

class Served {
  constructor() { this.live = true; }
  async ask(path, parameters) {
    const answer = await fetch(`api/${path}?${new URLSearchParams(parameters)}`);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  overview(have) { return this.ask("run", { have }); }
  timeline() { return this.ask("timeline", {}); }
  step(role, step) { return this.ask("step", { role, step }); }
  has() { return true; }
  rollout(id) { return this.ask("rollout", { id }); }
}

const embedded = document.getElementById("data").textContent;
const source = embedded ? new Exported(JSON.parse(embedded)) : new Served();
