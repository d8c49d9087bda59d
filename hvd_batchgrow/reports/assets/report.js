"use strict";
// Hover and zoom. The charts are in the page already; without this script they stay as they are.
(() => {
  const UNITS = 10000, TICKS = 6;
  const SVG = "http://www.w3.org/2000/svg";
  const place = (value, log, [low, high]) => ((log ? Math.log10(value) : value) - low) / (high - low);
  const element = (parent, tag, className = "", text = "") => {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return parent.appendChild(made);
  };

  const linearTicks = (low, high) => {
    const rough = (high - low) / TICKS, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) ticks.push(k * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [], every = Math.max(1, Math.ceil((high - low) / TICKS));
    for (let k = Math.floor(low); k <= Math.ceil(high); k++)
      if (k % every === 0) ticks.push(...(high - low < TICKS / 2 ? [1, 2, 5] : [1]).map(factor => factor * 10 ** k));
    const inside = ticks.filter(tick => Math.log10(tick) >= low - 1e-9 && Math.log10(tick) <= high + 1e-9);
    return inside.length > 2 ? inside : linearTicks(10 ** low, 10 ** high).filter(tick => tick > 0);
  };
  const tickText = value => {
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
      if (size >= unit && size < unit * 1e6) return Number((value / unit).toPrecision(4)) + letter;
    if (size && (size < 1e-4 || size >= 1e18)) return value.toPrecision(3);
    return Number(value.toPrecision(6)).toLocaleString("en-US", { maximumFractionDigits: 10 });
  };
  const valueText = value => Number(value.toPrecision(5)).toLocaleString("en-US", { maximumFractionDigits: 10 });

  // The last point at or before x in steps, else the nearest point with a value.
  const nearest = (curve, x) => {
    let low = 0, high = curve.x.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (curve.x[middle] <= x) low = middle + 1; else high = middle;
    }
    const before = low - 1, after = low;
    if (curve.steps) return x > curve.x[curve.x.length - 1] ? -1 : before;
    if (before < 0 || after >= curve.x.length) return before < 0 ? after : before;
    return x - curve.x[before] <= curve.x[after] - x ? before : after;
  };

  const path = (chart, values, xs) => {
    let text = "", pen = "M";
    values.forEach((value, k) => {
      if (value === null || (chart.log && value <= 0)) { pen = "M"; return; }
      const x = place(xs[k], false, chart.x), y = 1 - place(value, chart.log, chart.y);
      text += `${pen}${(UNITS * x).toFixed(1)} ${(UNITS * y).toFixed(1)}`;
      pen = "L";
    });
    return text;
  };
  const bandPath = (chart, curve) => {
    let text = "", from = -1;
    for (let k = 0; k <= curve.x.length; k++) {
      const known = k < curve.x.length && curve.low[k] !== null && curve.high[k] !== null;
      if (known && from < 0) from = k;
      if (!known && from >= 0) {
        const xs = curve.x.slice(from, k), lows = curve.low.slice(from, k), highs = curve.high.slice(from, k);
        text += path(chart, [...highs, ...lows.reverse()], [...xs, ...[...xs].reverse()]) + "Z";
        from = -1;
      }
    }
    return text;
  };

  const draw = (figure, chart) => {
    const svg = figure.querySelector(".plot svg"), grid = svg.querySelector(".grid"), labels = figure.querySelector(".ticks");
    const bands = [...svg.querySelectorAll(".band")], lines = [...svg.querySelectorAll(".line")];
    chart.curves.forEach((curve, k) => {
      lines[k].setAttribute("d", path(chart, curve.y, curve.x));
      if (curve.low) bands.shift().setAttribute("d", bandPath(chart, curve));
    });
    grid.replaceChildren();
    labels.replaceChildren();
    const tick = (kind, at, label) => {
      const line = grid.appendChild(document.createElementNS(SVG, "path"));
      line.setAttribute("d", kind === "y" ? `M0 ${UNITS * at}H${UNITS}` : `M${UNITS * at} 0V${UNITS}`);
      element(labels, "span", kind, label).style[kind === "y" ? "top" : "left"] = `${100 * at}%`;
    };
    for (const value of (chart.log ? logTicks : linearTicks)(...chart.y)) tick("y", 1 - place(value, chart.log, chart.y), tickText(value));
    for (const value of linearTicks(...chart.x)) tick("x", place(value, false, chart.x), tickText(value));
  };

  // Show a range of x, and the range of y that its points need.
  const zoom = (figure, chart, range) => {
    let low = Infinity, high = -Infinity;
    for (const curve of chart.curves) curve.x.forEach((x, k) => {
      if (x < range[0] || x > range[1]) return;
      for (const values of [curve.y, curve.low, curve.high]) {
        if (!values || values[k] === null || (chart.log && values[k] <= 0)) continue;
        const value = chart.log ? Math.log10(values[k]) : values[k];
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    });
    if (!(low <= high)) return;
    const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    const zoomed = { ...chart, x: range, y: [low - room, high + room] };
    draw(figure, zoomed);
    return zoomed;
  };

  const enhance = (figure, whole) => {
    const plot = figure.querySelector(".plot");
    let shown = whole, start = null, selection = null, reset = null;
    const cursor = element(plot, "div", "cursor"), hover = element(plot, "div", "hover");
    const at = event => {
      const box = plot.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    };
    const valueAt = share => shown.x[0] + share * (shown.x[1] - shown.x[0]);
    const hide = () => { cursor.hidden = hover.hidden = true; };
    const unzoom = () => {
      shown = whole;
      draw(figure, whole);
      reset?.remove();
      reset = null;
    };
    const show = share => {
      const x = valueAt(share), lines = [...plot.querySelectorAll(".line")].slice(0, shown.curves.length);
      hover.replaceChildren();
      element(hover, "div", "", `${figure.querySelector(".axis").textContent} ${valueText(x)}`);
      shown.curves.forEach((curve, k) => {
        const index = nearest(curve, x);
        if (index < 0 || curve.y[index] === null) return;
        const row = element(hover, "div");
        const sample = row.appendChild(document.createElementNS(SVG, "svg"));
        sample.setAttribute("viewBox", "0 0 18 6");
        const stroke = sample.appendChild(document.createElementNS(SVG, "path"));
        stroke.setAttribute("class", lines[k].getAttribute("class"));
        stroke.setAttribute("d", "M0 3H18");
        element(row, "span", "", curve.label);
        const band = curve.low && curve.low[index] !== null ? ` (${valueText(curve.low[index])} to ${valueText(curve.high[index])})` : "";
        const isAway = !curve.steps && Math.abs(curve.x[index] - x) > 0.01 * (shown.x[1] - shown.x[0]);
        element(row, "b", "", valueText(curve.y[index]) + band + (isAway ? ` at ${valueText(curve.x[index])}` : ""));
      });
      cursor.style.left = `${100 * share}%`;
      hover.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "";
      hover.style.right = share < 0.5 ? "" : `calc(${100 - 100 * share}% + 10px)`;
      cursor.hidden = hover.hidden = false;
    };
    hide();
    plot.addEventListener("pointerdown", event => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = at(event);
      plot.setPointerCapture(event.pointerId);
      selection = element(plot, "div", "selection");
    });
    plot.addEventListener("pointermove", event => {
      const share = at(event);
      show(share);
      if (start === null) return;
      selection.style.left = `${100 * Math.min(start, share)}%`;
      selection.style.width = `${100 * Math.abs(share - start)}%`;
    });
    plot.addEventListener("pointerup", event => {
      const ends = [start, at(event)].sort((a, b) => a - b).map(valueAt);
      const moved = start !== null && Math.abs(at(event) - start) > 0.02;
      selection?.remove();
      start = selection = null;
      if (!moved) return;
      shown = zoom(figure, whole, ends) ?? shown;
      if (shown !== whole && !reset) {
        reset = element(figure, "button", "reset", "Reset zoom");
        reset.type = "button";
        reset.addEventListener("click", unzoom);
      }
    });
    plot.addEventListener("pointerleave", () => { if (start === null) hide(); });
    plot.addEventListener("dblclick", unzoom);
    window.addEventListener("beforeprint", unzoom);
  };

  const charts = new Map(JSON.parse(document.getElementById("data").textContent).map(chart => [chart.name, chart]));
  for (const figure of document.querySelectorAll("figure.chart")) enhance(figure, charts.get(figure.dataset.name));
  document.documentElement.dataset.ready = "true";
})();
