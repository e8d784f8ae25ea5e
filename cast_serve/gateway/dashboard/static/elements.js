// Names, attributes and numbers -> the page's elements and what they say.

export const $ = (id) => document.getElementById(id);
function make(namespace, tag, attributes, children) {
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
export const html = (tag, attributes = {}, ...children) =>
  make("http://www.w3.org/1999/xhtml", tag, attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  make("http://www.w3.org/2000/svg", tag, attributes, children);

export const scaled = (factor, value) => (value == null ? null : factor * value);
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
export const number = (value) =>
  !Number.isFinite(value) ? "–" : Math.abs(value) >= 100 ? value.toFixed(0) : digits.format(value);
export const times = (ratio) => (Number.isFinite(ratio) ? `${ratio.toFixed(2)}×` : "–");
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
export const swatch = (variant) =>
  svg("svg", { class: "swatch", "aria-hidden": "true" },
    svg("line", { class: `series ${variant.style}`, x1: 2, x2: 26, y1: 4, y2: 4 }));
export const figures = (pairs) =>
  html("dl", { class: "figures" }, ...pairs.map(([name, value]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, value))));
