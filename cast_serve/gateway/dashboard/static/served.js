// What a directory says (`models` of /v1/comparison) and what its worker reports (cast_variant_info,
// cast_draft_acceptance_ratio) -> words about what a variant serves.

import { html, svg, number, megabytes } from "./elements.js";

const DTYPE_BITS = { bfloat16: 16, float16: 16, float32: 32 };
const SHOWN = /^cast_(variant_info|draft_acceptance_ratio)\{/;
const UNMEASURED = "not measured";
const ELSEWHERE = "unknown: the worker is given as a URL";

const isElsewhere = (model) => model != null && model.path == null;

export function variantInfos(metrics) {
  const found = new Map();
  for (const line of metrics.split("\n").filter((line) => SHOWN.test(line))) {
    const labels = [...line.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) =>
      [name, value.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign))]);
    const info = Object.fromEntries(labels);
    if (line.startsWith("cast_draft")) info.acceptance = Number(line.slice(line.lastIndexOf(" ")));
    found.set(info.variant, { ...found.get(info.variant), ...info });
  }
  return found;
}

function bits({ model, info }) {
  if (model?.bits_per_weight != null) return number(model.bits_per_weight);
  const share = Number(info?.weight_bytes) / Number(info?.dense_weight_bytes);
  return number(share * DTYPE_BITS[info?.dtype]);
}

function perplexity({ model }) {
  if (model == null) return null;
  if (isElsewhere(model)) return "unknown";
  if (!model.quality) return UNMEASURED;
  if (model.quality.perplexity == null) return "infinite";
  const before = model.quality.is_before_quantizing ? ` before ${model.quantized}` : "";
  return `${number(model.quality.perplexity)}${before}`;
}

export function summary(variant) {
  const parts = [`${bits(variant)} bits per weight`];
  if (perplexity(variant)) parts.push(`perplexity ${perplexity(variant)}`);
  return parts.join(", ");
}

function modelRows(variant) {
  const { model } = variant;
  if (model == null) return [];
  if (isElsewhere(model)) return [["Directory", ELSEWHERE], ["Perplexity", ELSEWHERE]];
  const { text, num_tokens: tokens } = model.quality ?? {};
  const over = text && tokens ? ` (${text}, ${tokens.toLocaleString("en")} tokens)` : "";
  return [
    ["Model", model.model],
    ["Directory", model.path],
    ["Perplexity", perplexity(variant) + over],
    ["Zeros", model.zeros == null ? "unknown" : `${number(100 * model.zeros)} %`],
  ];
}

function workerRows({ info }) {
  if (!info) return [["Worker", "not reported yet"]];
  const [bytes, denseBytes] = [Number(info.weight_bytes), Number(info.dense_weight_bytes)];
  const isKnown = bytes > 0 && denseBytes > 0;
  return [
    ["Bytes", isKnown
      && `${megabytes(bytes)} of ${megabytes(denseBytes)} dense (${number(bytes / denseBytes)})`],
    ["Pattern", info.pattern],
    ["Layers", `${info.num_sparse_layers ?? "–"} sparse, ${info.num_dense_layers ?? "–"} dense`],
    ["Type", info.dtype],
    ["Head", info.head],
    ["Kernel", info.kernel],
    ["ISA", info.isa],
    ...(info.draft ? [["Draft", draft(info)]] : []),
  ];
}

function draft({ draft: pattern, acceptance }) {
  return acceptance >= 0 ? `${pattern}, ${number(100 * acceptance)} % of its tokens accepted` : pattern;
}

export function facts(variant) {
  const list = html("dl", { class: "facts" });
  const rows = [...modelRows(variant), ["Bits per weight", bits(variant)], ...workerRows(variant)];
  for (const [name, value] of rows) list.append(html("dt", {}, name), html("dd", {}, value || "–"));
  const share = Number(variant.info?.weight_bytes) / Number(variant.info?.dense_weight_bytes);
  const shown = [list];
  if (variant.model?.problem) {
    shown.unshift(html("p", { class: "error" }, html("strong", {}, "Error: "), variant.model.problem));
  }
  if (share > 0 && Number.isFinite(share)) {
    shown.push(svg("svg", { class: "weight", "aria-hidden": "true" },
      svg("rect", { class: "all", width: "100%", height: "100%", rx: 4 }),
      svg("rect", { class: `dot ${variant.style}`, width: `${Math.min(100, 100 * share)}%`, height: "100%", rx: 4 })));
  }
  return shown;
}
