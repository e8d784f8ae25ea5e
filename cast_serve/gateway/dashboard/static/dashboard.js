// GET /readyz, /v1/comparison and /metrics every few seconds, and one stream of POST
// /v1/completions per variant -> the page. The words TTFT, TPOT and E2E mean what latency.py says.

import { checked, eventsOf, request } from "./client.js";
import { $, html, svg, scaled, number, times, swatch, figures } from "./elements.js";
import { facts, summary, variantInfos } from "./served.js";

const POLL_MS = 2000;
const POLLS_PER_METRICS = 5; // what is served changes only when a worker starts again
const MAX_POINTS = 600; // per chart; then every second one goes

const WAITING = "waiting for traffic";
const OFF = "off: set CAST_SHADOW_FRACTION";
const AGREEMENT = "Token agreement";
const CLAIM = "tpot"; // the one speed-up that the verdict goes by, as in a load test's report
const SPEEDUPS = [
  ["ttft", "TTFT", "time to first token"],
  ["tpot", "TPOT", "time per output token"],
  ["e2e", "E2E", "whole request"],
];
const CHARTS = [
  ["TTFT p50", "ms", (live, name) => scaled(1000, live.variants?.[name]?.ttft_s?.p50)],
  ["TPOT p50", "ms", (live, name) => scaled(1000, live.variants?.[name]?.tpot_s?.p50)],
  ["Output tokens/s p50", "tokens/s", (live, name) => live.variants?.[name]?.output_tokens_per_s?.p50],
  [
    AGREEMENT,
    "%",
    (live, name) => name === live.candidate ? scaled(100, live.agreement?.token_agreement?.mean) : null,
  ],
];

const variants = new Map(); // name -> { name, style, and the elements that show it }
let live = {}; // the latest /v1/comparison
let history = []; // { at_ms, values: one Map of variant name -> number per chart }

// Compare: one prompt on every variant at once

let stopping = null;

async function complete(variant, body, signal) {
  const run = { sentAt: NaN, firstAt: NaN, lastAt: NaN, tokens: 0, text: "", isDone: false };
  const text = document.createTextNode("");
  variant.answer.replaceChildren(text);
  const show = (state) => {
    variant.progress.textContent = state;
    const ttft = run.firstAt - run.sentAt;
    const [ttftShown, rateShown, tokensShown] = variant.figures.querySelectorAll("dd");
    ttftShown.replaceChildren(number(ttft), ...(ttft >= 0 ? [html("small", {}, " ms")] : []));
    rateShown.textContent = number(perSecond(run));
    tokensShown.textContent = run.tokens;
  };
  show("waiting for the first token");
  try {
    const options = {
      method: "POST",
      signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, model: variant.name }),
    };
    const response = await checked(
      await request("/v1/completions", options, () => (run.sentAt = performance.now())));
    const answerer = response.headers.get("X-Cast-Variant") ?? variant.name;
    for await (const event of eventsOf(response)) {
      const choice = event.choices?.[0];
      if (choice?.text || choice?.finish_reason) run.lastAt = performance.now();
      if (choice?.text) {
        if (!run.text) run.firstAt = run.lastAt;
        run.text += choice.text;
        run.tokens += 1; // until usage tells: an event may carry several tokens
        text.appendData(text.length ? choice.text : choice.text.trimStart());
      }
      run.tokens = event.usage?.completion_tokens ?? run.tokens;
      if (choice?.text || event.usage) show("answering");
    }
    run.isDone = answerer === variant.name;
    show(run.isDone ? "done" : `${answerer} answered instead`);
  } catch (error) {
    if (error.name === "AbortError") {
      show("stopped");
    } else {
      show("failed");
      variant.answer.append(
        html("p", { class: "error" }, html("strong", {}, "Error: "), error.message));
    }
  }
  $("spoken").textContent = `${variant.name}: ${variant.progress.textContent}, ${run.tokens} tokens`;
  return run;
}

const perSecond = (run) => (1000 * run.tokens) / (run.lastAt - run.sentAt);
const perToken = (run) => (run.tokens < 2 ? NaN : (run.lastAt - run.firstAt) / (run.tokens - 1));

function showOutcome(runs) {
  const { baseline, candidate } = pair();
  const [slow, fast] = [runs.get(baseline), runs.get(candidate)];
  if (!slow || !fast) return;
  if (!slow.isDone || !fast.isDone) {
    $("outcome").replaceChildren(html("p", {}, "No ratio: both variants must finish their answers."));
    return;
  }
  let same = 0;
  while (same < slow.text.length && slow.text[same] === fast.text[same]) same += 1;
  const isSame = slow.text === fast.text;
  $("outcome").replaceChildren(
    html("h3", {}, `${candidate} against ${baseline}, this prompt`),
    figures([
      ["TTFT", times((slow.firstAt - slow.sentAt) / (fast.firstAt - fast.sentAt))],
      ["TPOT", times(perToken(slow) / perToken(fast))],
      ["tokens/s", times(perSecond(fast) / perSecond(slow))],
    ]),
    html("p", { class: "muted" }, `Above 1, ${candidate} is faster. One prompt gives no interval, so this is not a verdict. ${
      isSame ? "The texts are the same." : `The texts differ from character ${same + 1} on.`}`),
  );
}

async function compare(event) {
  event.preventDefault();
  if (stopping || !variants.size) return;
  stopping = new AbortController();
  $("start").disabled = true;
  $("stop").disabled = false;
  $("stop").focus();
  $("outcome").replaceChildren();
  $("spoken").textContent = "Comparing";
  const body = {
    prompt: $("prompt").value,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  const runs = await Promise.all([...variants.values()].map(async (variant) =>
    [variant.name, await complete(variant, body, stopping.signal)]));
  showOutcome(new Map(runs));
  const hadFocus = document.activeElement === $("stop");
  $("start").disabled = false;
  $("stop").disabled = true;
  if (hadFocus) $("start").focus();
  stopping = null;
}

// Variants

function pair() {
  const names = [...variants.keys()];
  const baseline = live.baseline ?? (names.includes("dense") ? "dense" : names[0]);
  return { baseline, candidate: live.candidate ?? names.find((name) => name !== baseline) };
}

function addVariant(name) {
  const variant = {
    name,
    style: `v${variants.size % 4}`,
    readiness: html("li", { class: "state" }),
    progress: html("span", { class: "muted" }, "no answer yet"),
    figures: figures([["TTFT", "–"], ["tokens/s", "–"], ["tokens", "–"]]),
    answer: html("div", { class: "answer", tabindex: 0, role: "region", "aria-label": `Answer of ${name}` }),
    summary: html("p", { class: "muted" }),
    facts: html("div"),
    model: null, // of /v1/comparison
    info: null, // cast_variant_info
  };
  variants.set(name, variant);
  $("readiness").append(variant.readiness);
  $("columns").append(html("article", { class: "card", "data-variant": name },
    html("div", { class: "card-head" }, swatch(variant), html("h3", {}, name), variant.progress),
    variant.summary, variant.figures, variant.answer));
  $("sparsity").append(html("article", { class: "card", "data-variant": name },
    html("div", { class: "card-head" }, swatch(variant), html("h3", {}, name)), variant.facts));
  showFacts(variant);
}

function showFacts(variant) {
  variant.summary.textContent = summary(variant);
  variant.facts.replaceChildren(...facts(variant));
}

function showState({ name, readiness }, state) {
  readiness.textContent = `${name} ${state}`;
  readiness.classList.toggle("is-ready", state === "ready");
}

async function showReadiness() {
  try {
    const states = await (await request("/readyz")).json(); // with 503 too, while one is not ready
    for (const [name, state] of Object.entries(states)) { // true, false or "loading, 130 s so far"
      if (!variants.has(name)) addVariant(name);
      showState(variants.get(name), state === true ? "ready" : state || "not ready");
    }
    $("start").disabled = Boolean(stopping) || !variants.size; // nothing to ask before
  } catch (error) {
    for (const variant of variants.values()) showState(variant, "unknown");
    throw error;
  }
}

// Live: what passed through the gateway

function interval({ ratio, low, high }) {
  const reach = Math.max(0.5, ...[low, high].map((end) => Math.abs(Math.log2(end)))) * 1.05;
  const x = (value) => `${50 + (50 * Math.log2(value)) / reach}%`;
  const line = (style, x1, x2, y1, y2) => svg("line", { class: style, x1, x2, y1, y2 });
  return svg("svg", { class: "interval", "aria-hidden": "true" },
    line("rail", "0%", "100%", 8, 8), line("even", "50%", "50%", 0, 16),
    line("range", x(low), x(high), 8, 8), svg("circle", { cx: x(ratio), cy: 8, r: 4 }));
}

const small = (...lines) =>
  html("div", { class: "small muted" }, ...lines.filter(Boolean).map((line) => html("p", {}, line)));

const span = ({ low, high }) => (low == null ? "" : `${low.toFixed(2)} to ${high.toFixed(2)}`);

function stateOf(speedup) {
  if (speedup?.low == null) return "is-open";
  return speedup.low > 1 ? "is-better" : speedup.high < 1 ? "is-worse" : "is-even";
}

const tooFew = (kind) => `an interval needs ${live.min_requests?.interval ?? "–"} ${kind}`;
const kindOf = (metric) => (metric === "e2e" ? "requests of each variant" : "streamed requests of each variant");

function speedupCard([metric, title, meaning]) {
  const { baseline, candidate } = pair();
  const { p50, p95 } = live.speedups?.[metric] ?? {};
  const head = html("div", {}, html("h3", {}, title), html("p", { class: "muted" }, `${meaning}, p50`));
  if (!p50) return waitingCard(head, WAITING);
  const big = html("p", { class: "big" }, times(p50.ratio));
  const tail = p95 && `p95 ${[times(p95.ratio), span(p95)].filter(Boolean).join(", ")}`;
  const state = stateOf(p50);
  if (state === "is-open") {
    return html("article", { class: "card" }, head, big, small(tooFew(kindOf(metric)), tail));
  }
  const words = { "is-better": `${candidate} is faster`, "is-worse": `${candidate} is slower`, "is-even": "no clear difference" };
  return html("article", { class: `card ${state}` }, head, big, html("p", {}, words[state]),
    html("div", {}, interval(p50), html("p", { class: "scale", "aria-hidden": "true" },
      html("span", {}, `◂ ${baseline}`), html("span", {}, "1×"), html("span", {}, `${candidate} ▸`))),
    small(`${number(100 * p50.confidence)} % interval ${span(p50)}`, tail));
}

function showVerdict() {
  const { candidate } = pair();
  const { p50 } = live.speedups?.[CLAIM] ?? {};
  const state = stateOf(p50);
  const ratio = p50 && `${times(p50.ratio)} (${span(p50)})`;
  const words = {
    "is-open": `No verdict yet: ${tooFew(kindOf(CLAIM))}.`,
    "is-better": `${candidate} is faster per token: ${ratio}.`,
    "is-worse": `${candidate} is slower per token: ${ratio}.`,
    "is-even": `No clear difference per token: ${ratio}; the interval contains 1.`,
  };
  $("verdict").hidden = candidate == null;
  $("verdict").className = `verdict ${state}`;
  if ($("verdict").textContent !== words[state]) $("verdict").textContent = words[state];
}

function agreementCard() {
  const head = html("div", {}, html("h3", {}, "Agreement"),
    html("p", { class: "muted" }, "same next token"));
  const { token_agreement: tokens, kl_nats: kl } = live.agreement ?? {};
  if (!tokens) return waitingCard(head, waitingForShadow());
  const percent = (value) => (100 * value).toFixed(1);
  return html("article", { class: "card" }, head,
    html("p", { class: "big" }, `${percent(tokens.mean)} %`),
    small(
      tokens.low == null ? tooFew("requests")
        : `interval ${percent(tokens.low)} to ${percent(tokens.high)} %`,
      `${tokens.n_tokens} tokens in ${tokens.n_requests} requests`,
      kl && `KL ${number(kl.mean)} nats per token`));
}

const waitingForShadow = () => (live.shadow_fraction === 0 ? OFF : WAITING);

const waitingCard = (head, text) =>
  html("article", { class: "card is-waiting" }, head, html("p", { class: "big" }, text));

async function showComparison() {
  live = await (await checked(await request("/v1/comparison"))).json();
  const counts = Object.entries(live.variants ?? {}).filter(([, of]) => of?.num_requests)
    .map(([name, of]) => `${of.num_requests} ${name}`);
  const { canary } = live;
  const split = canary ? ` Canary: ${canary.variant} gets ${number(100 * canary.share)} % of ${canary.model}, ${canary.state}.` : "";
  $("window").textContent = counts.length
    ? `Live traffic, not paired: the latest ${live.window} requests of each variant. So far: ${counts.join(", ")}.${split}`
    : WAITING;
  showVerdict();
  $("speedups").replaceChildren(...SPEEDUPS.map(speedupCard), agreementCard());
  for (const variant of variants.values()) {
    variant.model = live.models?.[variant.name] ?? null;
    showFacts(variant);
  }
  const values = CHARTS.map(([, , read]) =>
    new Map([...variants.keys()].map((name) => [name, read(live, name)])));
  history.push({ at_ms: Date.now(), values });
  if (history.length > MAX_POINTS) history = history.filter((_, index) => index % 2 === 0);
  drawCharts();
}

// Charts over the page's lifetime

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999);
}

function drawChart(card, index) {
  const [title, unit] = CHARTS[index];
  const [graph, caption] = [card.querySelector("svg"), card.querySelector("figcaption")];
  const { width, height } = graph.getBoundingClientRect();
  const known = (name) => history.filter(({ values }) => Number.isFinite(values[index].get(name)));
  const shown = [...variants.values()].filter(({ name }) => known(name).length);
  const none = title === AGREEMENT ? waitingForShadow() : WAITING;
  const latest = (name) => `${number(known(name).at(-1).values[index].get(name))} ${unit}`;
  graph.setAttribute("aria-label", `${title}, latest: ${
    shown.map(({ name }) => `${name} ${latest(name)}`).join(", ") || none}`);
  caption.replaceChildren(...shown.map((variant) =>
    html("span", {}, swatch(variant), ` ${variant.name} `, html("b", {}, latest(variant.name)))));
  if (!shown.length) caption.textContent = none;

  const most = Math.max(...shown.flatMap(({ name }) => known(name).map(({ values }) => values[index].get(name))));
  const top = unit === "%" ? 100 : ceiling(most > 0 ? most : 1);
  const [left, right, above, below] = [44, width - 8, 8, height - 24];
  const [from, to] = [history[0].at_ms, Math.max(history.at(-1).at_ms, history[0].at_ms + POLL_MS)];
  const x = (at_ms) => left + ((right - left) * (at_ms - from)) / (to - from);
  const y = (value) => below - ((below - above) * value) / top;
  const ticks = [0, top / 2, top].flatMap((tick) => [
    svg("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, number(tick)),
  ]);
  const seconds = Math.round((to - from) / 1000);
  const age = seconds < 120 ? `${seconds} s ago` : `${Math.round(seconds / 60)} min ago`;
  const lines = shown.flatMap(({ name, style }) => {
    const points = known(name).map(({ at_ms, values }) => [x(at_ms), y(values[index].get(name))]);
    const [cx, cy] = points.at(-1);
    return [svg("polyline", { class: `series ${style}`, points: points.join(" ") }),
      svg("circle", { class: `dot ${style}`, cx, cy, r: 3.5 })];
  });
  const ends = [svg("text", { x: left, y: height - 4 }, age),
    svg("text", { x: right, y: height - 4, "text-anchor": "end" }, "now")];
  graph.replaceChildren(...(shown.length ? [...ticks, ...ends, ...lines] : [ticks[0]]));
}

function drawCharts() {
  if (history.length) [...$("charts").children].forEach(drawChart);
}

// What is served: from cast_variant_info in /metrics

async function showSparsity() {
  const text = await (await checked(await request("/metrics"))).text();
  for (const [name, info] of variantInfos(text)) {
    if (!variants.has(name)) continue;
    variants.get(name).info = info;
    showFacts(variants.get(name));
  }
}

// The page

let polls = 0;

async function poll() {
  let trouble = "";
  try {
    await showReadiness();
    await Promise.all([showComparison(), polls++ % POLLS_PER_METRICS === 0 && showSparsity()]);
  } catch (error) {
    trouble = `${error.message} Trying again.`;
  }
  if ($("trouble").textContent !== trouble) $("trouble").textContent = trouble; // spoken once
  setTimeout(poll, POLL_MS);
}

$("charts").append(...CHARTS.map(([title, unit]) => html("figure", { class: "card" },
  html("h3", {}, title, ...(title.includes(unit) ? [] : [`, ${unit}`])),
  svg("svg", { class: "chart", role: "img", "aria-label": `${title}: ${WAITING}` }),
  html("figcaption", {}, WAITING))));
$("speedups").replaceChildren(...SPEEDUPS.map(speedupCard), agreementCard());
$("prompt").value = $("example").value;
$("example").addEventListener("change", () => ($("prompt").value = $("example").value));
$("compare").addEventListener("submit", compare);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("compare").requestSubmit();
});
$("stop").addEventListener("click", () => stopping.abort());
new ResizeObserver(drawCharts).observe($("charts"));
poll();
