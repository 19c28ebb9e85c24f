(function () {
  "use strict";
  const root = document.documentElement;
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const chips = Array.from(document.querySelectorAll(".chip"));
  const views = new Map();
  let drawing = 0;

  function shown() {
    return chips.filter((chip) => chip.getAttribute("aria-pressed") === "true")
      .map((chip) => chip.dataset.series);
  }

  function options() {
    return {
      mode: "vega-lite", renderer: "svg", actions: false, ast: false,
      config: payload.themes[root.dataset.theme],
      tooltip: { theme: "custom" },
      patch: (spec) => {
        const signal = spec.signals.find((one) => one.name === "shown");
        if (signal) signal.value = shown();
        return spec;
      },
    };
  }

  async function draw(target) {
    const slug = target.dataset.figure;
    try {
      const old = views.get(slug);
      const result = await vegaEmbed(target, payload.figures[slug], options());
      if (old) old.finalize();
      views.set(slug, result);
      // A figure whose series are all switched off has no extent; that is no fault.
      result.view.logLevel(1); // errors only
    } catch (error) {
      target.classList.add("failed");
      target.textContent = "This figure could not be drawn: " + error.message;
      console.error(slug, error);
    }
  }

  async function drawAll() {
    const turn = ++drawing;
    delete root.dataset.charts;
    await Promise.all(Array.from(document.querySelectorAll(".chart"), draw));
    if (turn === drawing) root.dataset.charts = "ready";
  }

  const theme = document.getElementById("theme");
  function label() {
    document.getElementById("theme-word").textContent = root.dataset.theme === "dark" ? "light" : "dark";
  }
  theme.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("capo-report-theme", root.dataset.theme); } catch (error) { /* private */ }
    label();
    drawAll();
  });

  chips.forEach((chip) => chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") === "true";
    chip.setAttribute("aria-pressed", String(!on));
    const names = shown();
    views.forEach((result) => result.view.signal("shown", names).runAsync());
  }));

  function toCsv(rows) {
    const keys = Object.keys(rows[0] || {});
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
    };
    return [keys.join(",")].concat(rows.map((row) => keys.map((key) => cell(row[key])).join(","))).join("\n") + "\n";
  }
  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }
  // As it is shown: the theme's colours, the series that are switched on.
  const SAVERS = {
    csv: async (slug) => new Blob([toCsv(payload.figures[slug].datasets.data)], { type: "text/csv" }),
    svg: async (slug) => new Blob([await views.get(slug).view.toSVG()], { type: "image/svg+xml" }),
    png: async (slug) => {
      const canvas = await views.get(slug).view.toCanvas(2);
      return new Promise((done) => canvas.toBlob(done, "image/png"));
    },
  };
  document.querySelectorAll(".save").forEach((button) => button.addEventListener("click", async () => {
    const { figure, kind } = button.dataset;
    save(`${figure}.${kind}`, await SAVERS[kind](figure));
  }));

  label();
  drawAll();
})();
