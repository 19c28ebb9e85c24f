"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const LOWEST = -20, DECADES = 24, LEVELS = 65533, SIGNED = 32765, PAGE = 60;
  const cache = new Map();
  let current = null, shown = [], drawn = 0, pending = null;

  // Steps: deflated, numbers by their logarithm (capo/lab/inspect/encode.py)
  const fromCode = (code, levels) => code === 0 ? 0 : 10 ** (LOWEST + DECADES * (code - 1) / levels);
  const plain = (code) => code === 65535 ? NaN : fromCode(code, LEVELS);
  const signed = (code) => code === -32768 ? NaN : Math.sign(code) * fromCode(Math.abs(code), SIGNED);
  const KINDS = { u4: Uint32Array, f4: Float32Array, u2: Uint16Array, i2: Int16Array, i1: Int8Array };

  async function packed(number) {
    if (data.packed === null) {
      const answer = await fetch(`step/${number}`);
      if (!answer.ok) throw new Error(`step ${number}: ${answer.status}`);
      return answer.body;
    }
    const text = atob(data.packed[number]), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new Blob([bytes]).stream();
  }
  async function load(number) {
    if (cache.has(number)) return cache.get(number);
    const stream = (await packed(number)).pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const step = { number: header.step };
    let at = 4 + length;
    for (const [name, kind, size] of header.planes) {
      const bytes = size * KINDS[kind].BYTES_PER_ELEMENT;
      step[name] = new KINDS[kind](buffer.slice(at, at + bytes));
      at += bytes;
    }
    if (cache.size > 20) cache.delete(cache.keys().next().value);
    cache.set(number, step);
    return step;
  }
  const value = (step, name, i) =>
    name === "policy_shift" || name === "surprise" || name === "entropy" ? plain(step[name][i]) : signed(step[name][i]);
  const word = (id) => data.words[id] ?? `⟨${id}⟩`;
  const visible = (text) => {
    const out = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
    return out.trim() ? out : out.replaceAll(" ", "␣");
  };
  const number = (x) => {
    if (!Number.isFinite(x)) return "–";
    const a = Math.abs(x);
    return a !== 0 && (a < 1e-3 || a >= 1e4) ? x.toExponential(2) : String(+x.toPrecision(4));
  };

  // Colours: what is small recedes into the page, what is large stands out, in either theme. All keep their
  // order in lightness alone, so that they are read without hue; in the dark cividis (Nuñez et al. 2018).
  const THEMES = {
    light: {
      sizes: ["#f4f5f7", "#e6eaf2", "#cfd8ea", "#b1c1de", "#8fa5cd", "#6d87b8", "#4d699f", "#334c82", "#1d3162", "#00163f"],
      signs: ["#08306b", "#2171b5", "#6baed6", "#bdd7e7", "#f4f5f7", "#fdd0a2", "#fd9a4c", "#d95f0e", "#7f2704"],
    },
    dark: {
      sizes: ["#1b2233", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"],
      signs: ["#c6e2f5", "#7fbce3", "#3f8fcb", "#1d4f80", "#1b2233", "#6b3510", "#b5581a", "#ec8a3c", "#fdd0a2"],
    },
  };
  const stops = () => THEMES[document.documentElement.dataset.theme] ?? THEMES.light;
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function mix(ramp, x) {
    const place = Math.min(Math.max(x, 0), 1) * (ramp.length - 1), i = Math.min(Math.floor(place), ramp.length - 2);
    const [a, b] = [rgb(ramp[i]), rgb(ramp[i + 1])];
    return a.map((v, k) => Math.round(v + (b[k] - v) * (place - i)));
  }
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ink = (c) => (luminance(c) + 0.05) ** 2 > 1.05 * 0.05 ? "#000" : "#fff";
  const logPlace = (x, low, high) => (Math.log10(x) - Math.log10(low)) / (Math.log10(high) - Math.log10(low));
  const SCALES = {
    policy_shift: { low: data.ranges["policy_shift/low"], high: data.ranges["policy_shift/high"], log: true },
    objective_shift: { low: data.ranges["objective_shift/low"], high: data.ranges["objective_shift/high"], log: true, sign: true },
    surprise: { low: 1, high: 0, name: (v) => Math.exp(-v), text: ["1", "0"] },
    entropy: { low: 1e-3, high: 3, log: true },
    advantage: { low: 0, high: 2, sign: true },
  };
  function colour(name, v) {
    const scale = SCALES[name];
    if (!Number.isFinite(v)) return null;
    if (name === "surprise") return mix(stops().sizes, 1 - Math.exp(-v));
    const size = Math.abs(v);
    const place = size === 0 ? 0 : scale.log ? logPlace(size, scale.low, scale.high) : size / scale.high;
    const x = Math.min(Math.max(place, 0), 1);
    return scale.sign ? mix(stops().signs, 0.5 + Math.sign(v) * x / 2) : mix(stops().sizes, x);
  }
  function legend() {
    const name = $("colour").value, scale = SCALES[name], ramp = scale.sign ? stops().signs : stops().sizes;
    const ends = scale.text ?? (scale.sign ? [`−${number(scale.high)}`, `+${number(scale.high)}`] : [number(scale.low), number(scale.high)]);
    const bar = document.createElement("i");
    bar.style.background = `linear-gradient(90deg, ${ramp.join(",")})`;
    $("legend").replaceChildren(ends[0], bar, ends[1], scale.log ? " (log)" : "", " · framed: rejected");
    $("legend").setAttribute("aria-label", `colours from ${ends[0]} to ${ends[1]}; rejected tokens are framed and underlined twice`);
  }

  // Completions
  const rejected = (step, i) => step.reason[i] > 0;
  function* tokensOf(step, c) { for (let i = step.offsets[c]; i < step.offsets[c + 1]; i++) yield i; }
  const sum = (step, c) => { let s = 0; for (const i of tokensOf(step, c)) s = Math.max(s, plain(step.policy_shift[i]) || 0); return s; };
  function text(step, c) {
    let out = "";
    for (let i = step.prompt_offsets[c]; i < step.prompt_offsets[c + 1]; i++) out += word(step.prompt_ids[i]);
    for (const i of tokensOf(step, c)) out += word(step.token_ids[i]);
    return out.toLowerCase();
  }
  function chosen(step) {
    const low = $("reward-low").value === "" ? -Infinity : +$("reward-low").value;
    const high = $("reward-high").value === "" ? Infinity : +$("reward-high").value;
    const verdict = $("verdict").value, wanted = $("search").value.toLowerCase();
    const all = [...Array(step.offsets.length - 1).keys()].filter((c) => {
      const reward = step.reward[c];
      if ((low > -Infinity || high < Infinity) && !(reward >= low && reward <= high)) return false;
      if (verdict !== "all") {
        let some = false;
        for (const i of tokensOf(step, c)) some ||= rejected(step, i);
        if (some !== (verdict === "rejected")) return false;
      }
      return !wanted || text(step, c).includes(wanted);
    });
    const order = $("order").value;
    if (order === "shift") { const s = new Map(all.map((c) => [c, sum(step, c)])); all.sort((a, b) => s.get(b) - s.get(a)); }
    if (order === "reward") all.sort((a, b) => step.reward[a] - step.reward[b] || a - b);
    return all;
  }
  function card(step, c) {
    const box = document.createElement("article");
    box.className = "completion"; box.dataset.completion = c; box.tabIndex = -1;
    const head = document.createElement("header"), name = $("colour").value;
    let out = 0, shift = 0, advantage = NaN;
    for (const i of tokensOf(step, c)) { out += rejected(step, i); shift = Math.max(shift, plain(step.policy_shift[i]) || 0); }
    if (step.offsets[c] < step.offsets[c + 1]) advantage = signed(step.advantage[step.offsets[c]]);
    const fact = (label, v) => { const s = document.createElement("span"), b = document.createElement("b"); b.textContent = v; s.append(label + " ", b); head.append(s); };
    fact("completion", c); fact("reward", number(step.reward[c])); fact("advantage", number(advantage));
    fact("tokens", step.offsets[c + 1] - step.offsets[c]); fact("largest m_F", number(shift)); if (out) fact("rejected", out);
    const prompt = document.createElement("p"), tokens = document.createElement("div");
    prompt.className = "prompt"; tokens.className = "tokens";
    let words = "";
    for (let i = step.prompt_offsets[c]; i < step.prompt_offsets[c + 1]; i++) words += word(step.prompt_ids[i]);
    prompt.textContent = words;
    for (const i of tokensOf(step, c)) {
      const t = document.createElement("span"), raw = word(step.token_ids[i]);
      t.className = rejected(step, i) ? "t out" : "t"; t.tabIndex = -1; t.dataset.i = i;
      t.textContent = raw.trim() ? raw.replaceAll("\n", "↵\n") : visible(raw) + (raw.includes("\n") ? "\n" : "");
      paint(t, step, i, name);
      tokens.append(t);
    }
    box.append(head, prompt, tokens);
    return box;
  }
  function paint(t, step, i, name) {
    const c = colour(name, value(step, name, i));
    t.style.background = c ? `rgb(${c})` : "none"; t.style.color = c ? ink(c) : "inherit";
  }
  function list() {
    shown = chosen(current); drawn = 0;
    $("list").replaceChildren(); more();
    const all = current.offsets.length - 1;
    $("count").textContent = shown.length === all ? `${all} of step ${current.number}` : `${shown.length} of ${all} of step ${current.number}`;
    if (!shown.length) $("list").textContent = "No completion of this step fits the filter.";
  }
  function more() {
    const next = shown.slice(drawn, drawn + PAGE);
    $("list").append(...next.map((c) => card(current, c)));
    drawn += next.length; $("more").hidden = drawn >= shown.length;
  }
  async function go(n, then) {
    const place = data.steps.indexOf(n);
    if (place < 0) return;
    pending = n; $("step").value = place; $("step-name").textContent = n;
    let step;
    try { step = await load(n); } catch (error) { $("list").textContent = `Step ${n} could not be read: ${error.message}`; return; }
    if (pending !== n) return;
    current = step;
    list(); plot(); offenders(); remember();
    document.documentElement.dataset.step = n;
    if (then) then(step);
  }
  const neighbour = (by) => data.steps[Math.min(Math.max(+$("step").value + by, 0), data.steps.length - 1)];
  function remember() {
    try { history.replaceState(null, "", `#step=${pending}&colour=${$("colour").value}`); } catch { /* a sandboxed frame */ }
  }

  // The curve
  function plot() {
    const curve = data.curves.find((one) => one.key === $("curve").value), box = $("plot");
    if (!curve) { box.textContent = "The run has recorded no curve."; return; }
    const w = box.clientWidth || 500, h = 270, left = 52, right = 12, top = 10, bottom = 40;
    const xs = [...curve.points.map((p) => p[0]), ...data.steps], x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
    const f = curve.log ? Math.log10 : (v) => v, ys = curve.points.map((p) => f(p[1]));
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (!curve.log) { y0 = Math.min(y0, 0); } if (y1 - y0 < 1e-9) y1 = y0 + 1;
    const X = (v) => left + (w - left - right) * (v - x0) / (x1 - x0), Y = (v) => top + (h - top - bottom) * (1 - (v - y0) / (y1 - y0));
    const marks = [0, 0.25, 0.5, 0.75, 1].map((s) => y0 + s * (y1 - y0));
    const at = (v) => number(curve.log ? +(10 ** v).toPrecision(2) : +v.toPrecision(3));
    const line = curve.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)},${Y(f(p[1])).toFixed(1)}`).join("");
    box.innerHTML = `<svg viewBox="0 0 ${w} ${h}">` +
      marks.map((v) => `<line class="grid" x1="${left}" x2="${w - right}" y1="${Y(v)}" y2="${Y(v)}"/><text x="${left - 6}" y="${Y(v) + 4}" text-anchor="end">${at(v)}</text>`).join("") +
      [x0, Math.round((x0 + x1) / 2), x1].map((v, i) => `<text x="${X(v)}" y="${h - 8}" text-anchor="${["start", "middle", "end"][i]}">${i === 1 ? "step " : ""}${v}</text>`).join("") +
      data.steps.map((s) => `<line class="tick" x1="${X(s)}" x2="${X(s)}" y1="${h - bottom + 4}" y2="${h - bottom + 11}"/>`).join("") +
      `<path class="line" d="${line}"/>` + (curve.points.length < 40 ? curve.points.map((p) => `<circle class="dot" r="2.6" cx="${X(p[0])}" cy="${Y(f(p[1]))}"/>`).join("") : "") +
      `<line class="here" x1="${X(pending)}" x2="${X(pending)}" y1="${top}" y2="${h - bottom + 11}"/></svg>`;
    box.firstChild.onclick = (event) => {
      const bounds = box.getBoundingClientRect(), wanted = x0 + (x1 - x0) * ((event.clientX - bounds.left) * w / bounds.width - left) / (w - left - right);
      go(data.steps.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    };
  }

  // Worst offenders
  const CONTEXT = 3;
  function contextKey(step, c, i) {
    const first = Math.max(step.offsets[c], i - CONTEXT);
    let before = "";
    for (let k = first; k < i; k++) before += word(step.token_ids[k]);
    return `${first > step.offsets[c] ? "…" : "^"}${visible(before)}▸${visible(word(step.token_ids[i]))}`;
  }
  function key(step, c, i, by) { return by === "token" ? visible(word(step.token_ids[i])) : contextKey(step, c, i); }
  function ofStep(step, by) {
    const held = new Map(); let total = 0;
    for (let c = 0; c + 1 < step.offsets.length; c++) for (const i of tokensOf(step, c)) {
      const shift = plain(step.policy_shift[i]) || 0, name = key(step, c, i, by);
      total += shift;
      const row = held.get(name) ?? { key: name, shift: 0, count: 0, largest: 0, rejected: 0, step: step.number };
      row.shift += shift; row.count++; row.largest = Math.max(row.largest, shift); row.rejected += rejected(step, i);
      held.set(name, row);
    }
    return [...held.values()].sort((a, b) => b.shift - a.shift).slice(0, 40).map((row) => ({ ...row, share: total ? row.shift / total : 0 }));
  }
  function offenders() {
    const by = $("by").value, rows = $("scope").value === "run" ? data.offenders[by] : ofStep(current, by);
    $("offenders").replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr"), cells = [row.key, `${(100 * row.share).toFixed(1)} %`, row.count, number(row.largest), row.rejected, row.step];
      cells.forEach((cell, k) => {
        const td = document.createElement("td");
        if (k === 0) {
          const b = document.createElement("button"), cut = row.key.lastIndexOf("▸"), mark = document.createElement("b");
          mark.textContent = row.key.slice(cut + 1);
          b.append(cut >= 0 ? row.key.slice(0, cut) : "", mark); td.append(b);
        } else td.textContent = cell;
        line.append(td);
      });
      line.onclick = () => go(data.steps.includes(row.step) ? row.step : pending, (step) => seek(step, row.key, by));
      return line;
    }));
  }
  function seek(step, name, by) {
    let best = -1, where = -1, most = -1;
    const wanted = new Set();
    for (const c of shown) for (const i of tokensOf(step, c)) if (key(step, c, i, by) === name) {
      wanted.add(i);
      const shift = plain(step.policy_shift[i]) || 0;
      if (shift > most) { most = shift; best = i; where = c; }
    }
    if (best < 0) return;
    while (drawn < shown.length && shown.indexOf(where) >= drawn) more();
    for (const t of $("list").querySelectorAll(".t")) t.classList.toggle("found", wanted.has(+t.dataset.i));
    focus($("list").querySelector(`.t[data-i="${best}"]`));
  }
  function focus(t) { if (t) { t.focus({ preventScroll: true }); t.scrollIntoView({ block: "center" }); } }

  // What a token is
  function tip(t) {
    const step = current, i = +t.dataset.i, box = $("tip"), rows = [
      ["probability", number(Math.exp(-plain(step.surprise[i])))], ["entropy (nats)", number(plain(step.entropy[i]))],
      ["advantage", number(signed(step.advantage[i]))], ["policy shift m_F", number(plain(step.policy_shift[i]))],
      ["objective shift m_H", number(signed(step.objective_shift[i]))], ["weight", number(signed(step.weight[i]))],
      ["verdict", rejected(step, i) ? "rejected" : "kept"],
      ...(rejected(step, i) ? [["reason", data.reasons[step.reason[i]] ?? String(step.reason[i])]] : [])];
    const name = document.createElement("p"), table = document.createElement("table"), body = document.createElement("tbody");
    name.className = "name"; name.style.margin = "0 0 3px"; name.textContent = visible(word(step.token_ids[i]));
    for (const [label, v] of rows) { const r = document.createElement("tr"), a = document.createElement("th"), b = document.createElement("td"); a.textContent = label; b.textContent = v; r.append(a, b); body.append(r); }
    table.append(body); box.replaceChildren(name, table); box.hidden = false;
    const at = t.getBoundingClientRect(), own = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 12)) + scrollX}px`;
    const below = at.bottom + 8 + own.height < innerHeight;
    box.style.top = `${(below ? at.bottom + 8 : at.top - own.height - 8) + scrollY}px`;
    t.setAttribute("aria-describedby", "tip");
  }
  const untip = () => { $("tip").hidden = true; };
  $("list").addEventListener("mouseover", (e) => { const t = e.target.closest(".t"); if (t) tip(t); else untip(); });
  $("list").addEventListener("mouseleave", untip);
  $("list").addEventListener("focusin", (e) => { const t = e.target.closest(".t"); if (t) tip(t); });
  $("list").addEventListener("focusout", untip);
  $("list").addEventListener("click", (e) => e.target.closest(".t")?.focus({ preventScroll: true }));

  // Keys and controls
  function striking(by) {
    const all = [...$("list").querySelectorAll(".t")];
    const shifts = all.map((t) => plain(current.policy_shift[+t.dataset.i]) || 0).sort((a, b) => b - a);
    const bound = shifts[Math.min(shifts.length - 1, Math.max(4, Math.floor(shifts.length / 100)))];
    const marked = all.filter((t) => t.classList.contains("out") || plain(current.policy_shift[+t.dataset.i]) > bound);
    if (!marked.length) return;
    const here = marked.indexOf(document.activeElement);
    focus(marked[here < 0 ? (by > 0 ? 0 : marked.length - 1) : (here + by + marked.length) % marked.length]);
  }
  function completion(by) {
    const all = [...$("list").querySelectorAll(".completion")], here = all.indexOf(document.activeElement?.closest?.(".completion"));
    const next = all[Math.min(Math.max(here + by, 0), all.length - 1)];
    if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "center" }); }
  }
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || $("help").open) return;
    if (e.key === "Escape") { document.activeElement?.blur(); untip(); return; }
    if (e.target.closest("input, select, textarea")) return;
    const token = e.target.closest?.(".t");
    const act = {
      ArrowLeft: () => token ? focus(token.previousElementSibling) : go(neighbour(-1)),
      ArrowRight: () => token ? focus(token.nextElementSibling) : go(neighbour(1)),
      n: () => striking(1), p: () => striking(-1), j: () => completion(1), k: () => completion(-1),
      c: () => { const s = $("colour"); s.selectedIndex = (s.selectedIndex + 1) % s.options.length; recolour(); },
      t: () => $("theme").click(), "/": () => $("search").focus(), "?": () => $("help").showModal(),
    }[e.key];
    if (act) { e.preventDefault(); act(); }
  });
  function recolour() {
    const name = $("colour").value;
    for (const t of $("list").querySelectorAll(".t")) paint(t, current, +t.dataset.i, name);
    legend(); remember();
  }
  function theme(name) {
    document.documentElement.dataset.theme = name;
    $("theme").textContent = name === "dark" ? "◑ light" : "◐ dark";
    try { localStorage.setItem("capo-theme", name); } catch { /* a file may keep nothing */ }
  }
  let kept = null;
  try { kept = localStorage.getItem("capo-theme"); } catch { /* as above */ }
  theme(kept ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  $("theme").onclick = () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); if (current) recolour(); };
  $("help-button").onclick = () => $("help").showModal();
  $("step").max = data.steps.length - 1;
  $("step").oninput = () => go(data.steps[+$("step").value]);
  $("previous").onclick = () => go(neighbour(-1));
  $("next").onclick = () => go(neighbour(1));
  $("colour").onchange = recolour;
  for (const id of ["reward-low", "reward-high", "search"]) $(id).oninput = list;
  for (const id of ["verdict", "order"]) $(id).onchange = list;
  for (const id of ["scope", "by"]) $(id).onchange = offenders;
  $("more").onclick = more;
  for (const curve of data.curves) $("curve").add(new Option(curve.label, curve.key));
  $("curve").onchange = plot;
  addEventListener("resize", plot);
  const asked = new URLSearchParams(location.hash.slice(1)), wanted = +asked.get("step");
  if (asked.get("colour") in SCALES) $("colour").value = asked.get("colour");
  legend();
  go(data.steps.includes(wanted) ? wanted : data.open);
})();
