
"use strict";
(() => {
  // Names and titles of the run may hold anything: text goes into the page as text nodes only.

  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const SVG = "http:" + "//www.w3.org/2000/svg"; // a name, nothing that is fetched
  const MAP_MARGIN = 24;
  const LEGEND_ENTRIES = 200;
  const REACH = 14; // pixels from the pointer to a point

  // --- common ---------------------------------------------------------------------------------

  function fail(where, error) {
    const box = document.getElementById("failure");
    const line = document.createElement("div");
    line.textContent = `${where} could not be drawn: ${error && error.message ? error.message : error}`;
    box.append(line);
    box.hidden = false;
    root.dataset.failures = `${root.dataset.failures || ""}${line.textContent}\n`;
  }
  window.addEventListener("error", (event) => fail("Something", event.error || event.message));
  window.addEventListener("unhandledrejection", (event) => fail("Something", event.reason));
  document.addEventListener("securitypolicyviolation", (event) =>
    fail("Something", `${event.violatedDirective} forbids ${event.blockedURI}`));

  function element(name, options = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (key === "colour") made.style.background = value;
      else if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function shape(name, attributes = {}, text = null) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(digits - 1);
    return value.toLocaleString("en", size >= 1000
      ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits });
  }

  function formatted(value, scale) {
    if (value === null || value === undefined) return "–";
    if (scale === "share") return `${(100 * value).toFixed(1)}%`;
    return scale === "count" ? value.toLocaleString("en") : number(value);
  }

  const colourOf = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // --- axes -----------------------------------------------------------------------------------

  function linearTicks(low, high, count, whole) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    if (whole) step = Math.max(1, Math.ceil(step));
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
      ticks.push(Number((i * step).toPrecision(12)));
    }
    return ticks;
  }

  function logTicks(low, high) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const m of [1, 2, 5]) all.push(m * 10 ** power);
    }
    let ticks = all.filter((t) => t >= low * 0.999 && t <= high * 1.001);
    if (ticks.length > 6) {
      const decades = ticks.filter((t) => Math.abs(Math.log10(t) - Math.round(Math.log10(t))) < 1e-9);
      const every = Math.ceil(decades.length / 6);
      ticks = decades.length >= 2 ? decades.filter((_, i) => i % every === 0) : ticks;
    }
    return ticks;
  }

  function valueAxis(values, scale) {
    let low = Math.min(...values), high = Math.max(...values);
    if (scale === "number" && low > 0 && high > 8 * low) {
      const [a, b] = [Math.log10(low), Math.log10(high)];
      const margin = 0.04 * (b - a);
      const span = b - a + 2 * margin;
      return { place: (v) => (Math.log10(v) - a + margin) / span, ticks: logTicks(low, high) };
    }
    if (scale === "count") low = Math.min(low, 0);
    if (scale === "count") high = Math.max(high, 1);
    if (high === low) {
      const room = Math.abs(high) * 0.1 || 1;
      low -= room;
      high += room;
    }
    const margin = 0.05 * (high - low);
    const bottom = scale === "count" ? low - margin : Math.min(low - margin, low);
    const span = high + margin - bottom;
    return {
      place: (v) => (v - bottom) / span,
      ticks: linearTicks(scale === "count" ? low : bottom, high + margin, 4, scale === "count"),
    };
  }

  // --- curves ---------------------------------------------------------------------------------

  function drawCurves(container, curves) {
    const { epochs, phases } = curves;
    const listeners = [];
    const show = (index) => listeners.forEach((listener) => listener(index));
    for (const panel of curves.panels) {
      container.append(drawPanel(panel, epochs, phases, show, listeners));
    }
    show(null);
  }

  function drawPanel(panel, epochs, phases, show, listeners) {
    const width = 380, height = 200, left = 50, right = 10, top = 20, bottom = 24;
    const values = panel.lines.flatMap((line) => line.values.filter((v) => v !== null));
    const axis = valueAxis(values, panel.scale);
    const first = Math.min(...epochs) - 0.5, last = Math.max(...epochs) + 0.5;
    const x = (epoch) => left + ((epoch - first) / (last - first)) * (width - left - right);
    const y = (value) => height - bottom - axis.place(value) * (height - top - bottom);
    const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "img" });
    drawing.setAttribute("aria-label", `${panel.title}. ` + panel.lines.map((line) => {
      const known = line.values.filter((v) => v !== null);
      return `${line.label}: ${formatted(known[0], panel.scale)} at first, ` +
        `${formatted(known[known.length - 1], panel.scale)} at the end`;
    }).join("; "));

    // Phases: every second one is shaded, each is named where there is room.
    let start = 0, shaded = true;
    for (let i = 1; i <= epochs.length; i += 1) {
      if (i < epochs.length && phases[i] === phases[start]) continue;
      const from = x(epochs[start] - 0.5), to = x(epochs[i - 1] + 0.5);
      const several = start > 0 || i < epochs.length;
      if (several && shaded) {
        drawing.append(shape("rect", {
          class: "band", x: from, y: top, width: to - from, height: height - top - bottom }));
      }
      if (several && to - from > 6.5 * phases[start].length) {
        drawing.append(shape("text", {
          x: (from + to) / 2, y: top - 6, "text-anchor": "middle" }, phases[start]));
      }
      start = i;
      shaded = !shaded;
    }
    for (const tick of axis.ticks) {
      const at = y(tick);
      drawing.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
      const text = panel.scale === "share" ? `${Number((100 * tick).toPrecision(6))}%` : number(tick);
      drawing.append(shape("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, text));
    }
    for (const tick of linearTicks(first + 0.5, Math.max(last - 0.5, first + 1.5), 5, true)) {
      if (tick > last) continue;
      drawing.append(shape("text", {
        x: x(tick), y: height - 8, "text-anchor": "middle" }, tick.toLocaleString("en")));
    }
    drawing.append(shape("line", {
      class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));

    const keys = element("ul", { class: "keys" });
    const head = element("span");
    const drawn = panel.lines.map((line, index) => {
      const next = panel.lines.slice(0, index).filter((l) => !l.beneath).length;
      const colour = line.colour || (line.beneath ? "var(--ink)" : `var(--line${next % 7})`);
      for (const part of parts(line.values, phases)) {
        if (part.length === 1) {
          drawing.append(withFill(shape("circle", {
            cx: x(epochs[part[0]]), cy: y(line.values[part[0]]), r: line.beneath ? 4 : 2.5,
            opacity: line.beneath ? 0.3 : 1 }), colour));
          continue;
        }
        const path = part.map((i) => `${x(epochs[i]).toFixed(1)},${y(line.values[i]).toFixed(1)}`);
        const made = shape("polyline", {
          class: line.beneath ? "line beneath" : "line", points: path.join(" ") });
        made.style.stroke = colour;
        drawing.append(made);
      }
      const dot = withFill(shape("circle", { r: 3.5, visibility: "hidden" }), colour);
      const value = element("b");
      const key = element("li", {}, element("i", { colour }), `${line.label} `, value);
      keys.append(key);
      return { line, dot, value };
    });
    const cursor = shape("line", {
      class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    drawing.append(cursor, ...drawn.map((d) => d.dot));

    listeners.push((index) => {
      cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
      if (index !== null) {
        cursor.setAttribute("x1", x(epochs[index]));
        cursor.setAttribute("x2", x(epochs[index]));
      }
      head.textContent = index === null
        ? "last values" : `epoch ${epochs[index].toLocaleString("en")}`;
      for (const { line, dot, value } of drawn) {
        const at = index === null ? lastKnown(line.values) : index;
        const found = at < 0 ? null : line.values[at];
        value.textContent = formatted(found, panel.scale);
        dot.setAttribute("visibility", index === null || found === null ? "hidden" : "visible");
        if (index !== null && found !== null) {
          dot.setAttribute("cx", x(epochs[at]));
          dot.setAttribute("cy", y(found));
        }
      }
    });
    let current = null;
    const point = (event) => {
      const box = drawing.getBoundingClientRect();
      const epoch = first + (((event.clientX - box.left) / box.width) * width - left) /
        (width - left - right) * (last - first);
      current = nearestIndex(epochs, epoch);
      show(current);
    };
    const leave = () => { current = null; show(null); };
    drawing.addEventListener("pointermove", point);
    drawing.addEventListener("pointerdown", point);
    drawing.addEventListener("pointerleave", leave);
    drawing.addEventListener("blur", leave);
    drawing.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const from = current === null ? (step > 0 ? -1 : epochs.length) : current;
      current = Math.min(Math.max(from + step, 0), epochs.length - 1);
      show(current);
    });
    return element("figure", { class: "panel" },
      element("figcaption", {}, panel.title, head), keys, drawing);
  }

  function withFill(made, colour) {
    made.style.fill = colour;
    return made;
  }

  function lastKnown(values) {
    for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null) return i;
    return -1;
  }

  function nearestIndex(sorted, wanted) {
    let best = 0;
    sorted.forEach((value, i) => {
      if (Math.abs(value - wanted) < Math.abs(sorted[best] - wanted)) best = i;
    });
    return best;
  }

  // A line breaks between phases and where a value is missing.
  function parts(values, phases) {
    const all = [];
    let open = [];
    values.forEach((value, i) => {
      if (open.length && (value === null || phases[i] !== phases[i - 1])) {
        all.push(open);
        open = [];
      }
      if (value !== null) open.push(i);
    });
    if (open.length) all.push(open);
    return all;
  }

  // --- examples -------------------------------------------------------------------------------

  // The sheet of images, once it is decoded; null where examples are vectors.
  function loadSprite(sprite) {
    if (!sprite) return Promise.resolve(null);
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("the images cannot be decoded"));
      image.src = sprite.url;
    });
  }

  function drawTile(canvas, image, sprite, index) {
    canvas.width = sprite.width;
    canvas.height = sprite.height;
    const [column, row] = [index % sprite.columns, Math.floor(index / sprite.columns)];
    canvas.getContext("2d").drawImage(image, column * sprite.width, row * sprite.height,
      sprite.width, sprite.height, 0, 0, sprite.width, sprite.height);
  }

  // --- map ------------------------------------------------------------------------------------

  function drawMap(map, clusters, classes, image) {
    const canvas = document.getElementById("map-canvas");
    const readOut = document.getElementById("map-read-out");
    const legend = document.getElementById("map-legend");
    const n = map.x.length;
    const state = {
      by: "cluster", highlighted: { cluster: null, class: null }, selected: null,
      zoom: 1, x: 0.5, y: 0.5, width: 1, height: 1, pinned: false,
    };
    document.getElementById("map-about").textContent = `${map.about}, × centroids`;

    const groupsOf = (by) => (by === "cluster" ? clusters : classes);
    const groupOf = (i) => (state.by === "cluster" ? map.cluster[i] : map.class[i]);
    const scale = () => state.zoom * (Math.min(state.width, state.height) - 2 * MAP_MARGIN);
    const place = (x, y) => [
      state.width / 2 + (x - state.x) * scale(), state.height / 2 - (y - state.y) * scale()];

    // In a scattered order, so that no group lies on top of the others.
    const order = Array.from({ length: n }, (_, i) => i)
      .sort((a, b) => ((a * 7919) % 10007) - ((b * 7919) % 10007));

    let waiting = false;
    function redraw() {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; paint(); });
    }

    function paint() {
      const ratio = window.devicePixelRatio || 1;
      state.width = canvas.clientWidth;
      state.height = canvas.clientHeight;
      if (canvas.width !== Math.round(state.width * ratio)) canvas.width = state.width * ratio;
      if (canvas.height !== Math.round(state.height * ratio)) canvas.height = state.height * ratio;
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, state.width, state.height);
      const [ink, paper, faint] = ["--ink", "--card", "--faint"].map(colourOf);
      const highlighted = state.highlighted[state.by];
      const radius = Math.min(Math.max(60 / Math.sqrt(n + 1), 2.2), 5) * state.zoom ** 0.3;
      const groups = groupsOf(state.by);
      for (const front of highlighted === null ? [true] : [false, true]) {
        for (const i of order) {
          const group = groupOf(i);
          if (highlighted !== null && (group === highlighted) !== front) continue;
          const [x, y] = place(map.x[i], map.y[i]);
          if (x < -9 || y < -9 || x > state.width + 9 || y > state.height + 9) continue;
          context.globalAlpha = front ? 0.8 : 0.16;
          context.fillStyle = front ? groups[group].colour : faint;
          context.beginPath();
          context.arc(x, y, radius, 0, 2 * Math.PI);
          context.fill();
        }
      }
      context.globalAlpha = 1;
      paintCentroids(context, ink, paper);
      if (state.selected !== null) {
        const [x, y] = place(map.x[state.selected], map.y[state.selected]);
        context.lineWidth = 2;
        context.strokeStyle = ink;
        context.beginPath();
        context.arc(x, y, radius + 4, 0, 2 * Math.PI);
        context.stroke();
      }
    }

    function paintCentroids(context, ink, paper) {
      const few = map.centroids.cluster.length <= 30;
      context.font = "600 12px system-ui, sans-serif";
      context.textAlign = "left";
      context.textBaseline = "middle";
      context.lineCap = "round";
      map.centroids.cluster.forEach((cluster, i) => {
        const chosen = state.by === "cluster" ? state.highlighted.cluster : null;
        if (chosen !== null && chosen !== cluster) return;
        const [x, y] = place(map.centroids.x[i], map.centroids.y[i]);
        const arm = few ? 5 : 2.5;
        for (const [colour, width] of [[paper, few ? 5 : 3], [ink, few ? 2 : 1.2]]) {
          context.strokeStyle = colour;
          context.lineWidth = width;
          context.beginPath();
          context.moveTo(x - arm, y - arm);
          context.lineTo(x + arm, y + arm);
          context.moveTo(x - arm, y + arm);
          context.lineTo(x + arm, y - arm);
          context.stroke();
        }
        if (few || chosen !== null) {
          context.lineWidth = 3;
          context.strokeStyle = paper;
          context.strokeText(String(cluster), x + 9, y);
          context.fillStyle = ink;
          context.fillText(String(cluster), x + 9, y);
        }
      });
    }

    // What is known about a point.
    function select(i) {
      if (i === state.selected && i !== null) return;
      state.selected = i;
      readOut.replaceChildren();
      if (i === null) {
        readOut.append(element("p", { class: "quiet" }, "Point at an example to see it here."));
        redraw();
        return;
      }
      if (image) {
        const tile = element("canvas", { role: "img", "aria-label": `example ${map.rows[i]}` });
        drawTile(tile, image, map.sprite, i);
        readOut.append(tile);
      }
      const list = element("dl");
      const say = (name, value) => list.append(
        element("dt", {}, name), element("dd", {}, value));
      say("example", map.rows[i].toLocaleString("en"));
      say("cluster", String(map.cluster[i]));
      if (classes) say("class", classes[map.class[i]].name);
      say("distance", number(map.distance[i], 4));
      if (map.features) {
        const shown = map.features.values[i];
        const rest = map.features.n - shown.length;
        say("features", shown.map((v) => number(v)).join(", ") + (rest > 0 ? ` and ${rest.toLocaleString("en")} more` : ""));
      }
      readOut.append(list);
      redraw();
    }

    function pointAt(x, y) {
      let best = null, least = REACH * REACH;
      for (let i = 0; i < n; i += 1) {
        const [px, py] = place(map.x[i], map.y[i]);
        const distance = (px - x) ** 2 + (py - y) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
      return best;
    }

    function zoomAt(factor, x, y) {
      const zoom = Math.min(Math.max(state.zoom * factor, 0.5), 60);
      const [wasX, wasY] = [(x - state.width / 2) / scale(), (state.height / 2 - y) / scale()];
      const ratio = state.zoom / zoom;
      state.x += wasX * (1 - ratio);
      state.y += wasY * (1 - ratio);
      state.zoom = zoom;
      redraw();
    }
    const zoomMiddle = (factor) => zoomAt(factor, state.width / 2, state.height / 2);
    function reset() {
      Object.assign(state, { zoom: 1, x: 0.5, y: 0.5 });
      redraw();
    }

    // Pointers: one moves the map, two pinch it, none shows what lies beneath.
    const held = new Map();
    let dragged = 0;
    const local = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      held.set(event.pointerId, local(event));
      dragged = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = local(event);
      const before = held.get(event.pointerId);
      if (!before) {
        if (!state.pinned) select(pointAt(x, y));
        return;
      }
      if (held.size === 1) {
        dragged += Math.abs(x - before[0]) + Math.abs(y - before[1]);
        if (dragged > 4 && !canvas.hasPointerCapture(event.pointerId)) {
          canvas.setPointerCapture(event.pointerId);
        }
        state.x -= (x - before[0]) / scale();
        state.y += (y - before[1]) / scale();
        redraw();
      } else {
        const other = [...held].find(([id]) => id !== event.pointerId)[1];
        const now = Math.hypot(x - other[0], y - other[1]);
        const then = Math.hypot(before[0] - other[0], before[1] - other[1]);
        dragged += 99;
        if (then > 0) zoomAt(now / then, (x + other[0]) / 2, (y + other[1]) / 2);
      }
      held.set(event.pointerId, [x, y]);
    });
    const release = (event) => held.delete(event.pointerId);
    canvas.addEventListener("pointerup", (event) => {
      release(event);
      // A click holds the example, so that the pointer can leave the map.
      if (dragged <= 4) {
        const i = pointAt(...local(event));
        state.pinned = i !== null;
        select(i);
      }
    });
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("lostpointercapture", release);
    canvas.addEventListener("pointerleave", (event) => {
      release(event);
      if (!state.pinned && document.activeElement !== canvas) select(null);
    });
    canvas.addEventListener("dblclick", (event) => zoomAt(2, ...local(event)));
    canvas.addEventListener("wheel", (event) => {
      // Without a click before it, or Ctrl, the wheel scrolls the page.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 30 : 1;
      zoomAt(Math.exp(-0.0016 * lines * event.deltaY), ...local(event));
    }, { passive: false });

    const directions = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    canvas.addEventListener("keydown", (event) => {
      const direction = directions[event.key];
      if (direction) step(direction);
      else if (event.key === "+" || event.key === "=") zoomMiddle(1.4);
      else if (event.key === "-") zoomMiddle(1 / 1.4);
      else if (event.key === "0") reset();
      else if (event.key === "Escape") {
        state.pinned = false;
        select(null);
      } else return;
      event.preventDefault();
    });

    // To the nearest point within 45° of a direction; from nowhere, to the middle of the view.
    function step([dx, dy]) {
      const from = state.selected;
      const [x, y] = from === null ? [state.x, state.y] : [map.x[from], map.y[from]];
      let best = null, least = Infinity;
      for (let i = 0; i < n; i += 1) {
        const [along, across] = dx !== 0
          ? [(map.x[i] - x) * dx, map.y[i] - y] : [(map.y[i] - y) * dy, map.x[i] - x];
        const distance = along ** 2 + across ** 2;
        const ahead = from === null || (along > 0 && Math.abs(across) <= along);
        if (i !== from && ahead && distance < least) [best, least] = [i, distance];
      }
      if (best === null) return;
      state.pinned = true;
      const [px, py] = place(map.x[best], map.y[best]);
      if (px < 0 || py < 0 || px > state.width || py > state.height) {
        [state.x, state.y] = [map.x[best], map.y[best]];
      }
      select(best);
    }

    // The legend: a click highlights a group, a second one lets it go.
    function drawLegend() {
      const groups = groupsOf(state.by);
      const order = groups.map((_, i) => i);
      if (groups.length > 30) order.sort((a, b) => groups[b].size - groups[a].size);
      legend.replaceChildren(...order.slice(0, LEGEND_ENTRIES).map((i) => {
        const button = element("button", {
          type: "button", "aria-pressed": String(state.highlighted[state.by] === i) },
        element("i", { colour: groups[i].colour, "aria-hidden": "true" }),
        element("span", {}, groups[i].name), element("small", {}, groups[i].about));
        button.addEventListener("click", () => {
          const before = state.highlighted[state.by];
          state.highlighted[state.by] = before === i ? null : i;
          [...legend.querySelectorAll("button")].forEach((other) =>
            other.setAttribute("aria-pressed", String(other === button && before !== i)));
          redraw();
        });
        return button;
      }));
      if (groups.length > LEGEND_ENTRIES) {
        legend.append(element("p", { class: "quiet" },
          `and ${(groups.length - LEGEND_ENTRIES).toLocaleString("en")} smaller ones`));
      }
    }

    function choices(id, options) {
      const made = options.map(([text, label, act]) => {
        const button = element("button", { type: "button", "aria-label": label }, text);
        button.addEventListener("click", () => act(button));
        return button;
      });
      document.getElementById(id).append(...made);
      return made;
    }
    if (classes) {
      const colour = (by) => (button) => {
        state.by = by;
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        drawLegend();
        redraw();
      };
      const buttons = choices("map-colour", [
        ["by cluster", null, colour("cluster")], ["by class", null, colour("class")]]);
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === 0)));
    }
    choices("map-zoom", [
      ["+", "Zoom in", () => zoomMiddle(1.5)], ["−", "Zoom out", () => zoomMiddle(1 / 1.5)],
      ["all", "Show everything", reset]]);

    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    new ResizeObserver(redraw).observe(canvas);
    drawLegend();
    select(null);
    paint();
  }

  // --- gallery --------------------------------------------------------------------------------

  function drawGallery(gallery, clusters, classes, image) {
    const container = document.querySelector("#gallery .gallery");
    const some = gallery.entries.length < gallery.n_clusters
      ? ` The largest ${gallery.entries.length} of ${gallery.n_clusters.toLocaleString("en")} clusters.` : "";
    let about = "Those nearest to the centroid, and behind the rule those farthest from it: errors show there.";
    if (classes && image) about += " Framed: of another class than most of the cluster.";
    if (gallery.lines) {
      about = "Bold: nearest to the centroid; dashed: farthest from it, where errors show. ";
      const { features, n } = gallery.lines;
      about += features.length < n
        ? `The ${features.length} of ${n.toLocaleString("en")} features in which clusters differ most.`
        : `${n.toLocaleString("en")} feature${n === 1 ? "" : "s"}.`;
    }
    document.getElementById("gallery-about").textContent = about + some;

    for (const entry of gallery.entries) {
      const cluster = clusters[entry.cluster];
      const box = element("div", { class: "cluster" }, element("h3", {},
        element("i", { colour: cluster.colour, "aria-hidden": "true" }),
        element("span", {}, cluster.name), element("small", {}, cluster.about)));
      if (!entry.nearest.length) box.append(element("p", { class: "quiet" }, "no example"));
      else if (image) box.append(imageRow(gallery, entry, cluster, classes, image));
      else if (gallery.lines) box.append(linesOf(gallery, entry, cluster));
      container.append(box);
    }
  }

  function imageRow(gallery, entry, cluster, classes, image) {
    const tile = (index, place) => {
      const other = classes && gallery.class[index] !== cluster.leader;
      const name = classes ? `, ${classes[gallery.class[index]].name}` : "";
      const text = `${place}: example ${gallery.rows[index]}${name}, ` +
        `distance ${number(gallery.distance[index], 4)}`;
      const made = element("canvas", {
        role: "img", "aria-label": text, title: text, class: other ? "other" : null });
      drawTile(made, image, gallery.sprite, index);
      return made;
    };
    const row = element("div", { class: "row" }, ...entry.nearest.map((i) => tile(i, "nearest")));
    if (entry.farthest.length) {
      row.append(element("div", { class: "far" }, ...entry.farthest.map((i) => tile(i, "farthest"))));
    }
    return row;
  }

  function linesOf(gallery, entry, cluster) {
    const width = 560, height = 96, margin = 8;
    const { values } = gallery.lines;
    const known = gallery.lines.range;
    const count = gallery.lines.features.length;
    const x = (j) => (count === 1 ? width / 2 : margin + (j / (count - 1)) * (width - 2 * margin));
    const y = (v) => height - margin - ((v - known[0]) / known[1]) * (height - 2 * margin);
    const drawing = shape("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${cluster.name}: ${entry.nearest.length} nearest and ` +
        `${entry.farthest.length} farthest examples as lines over ${count} features` });
    const add = (index, far) => {
      const points = values[index]
        .map((v, j) => (v === null ? null : `${x(j).toFixed(1)},${y(v).toFixed(1)}`))
        .filter((point) => point !== null);
      if (!points.length) return;
      if (points.length === 1) {
        const [cx, cy] = points[0].split(",");
        drawing.append(withFill(shape("circle", { cx, cy, r: 3, opacity: far ? 0.4 : 0.8 }),
          far ? "var(--faint)" : cluster.colour));
        return;
      }
      const line = shape("polyline", { class: "line", points: points.join(" ") });
      line.style.stroke = far ? "var(--faint)" : cluster.colour;
      line.style.strokeWidth = far ? 1 : 1.4;
      line.style.opacity = 0.75;
      if (far) line.style.strokeDasharray = "3 3";
      drawing.append(line);
    };
    entry.farthest.forEach((i) => add(i, true));
    entry.nearest.forEach((i) => add(i, false));
    return drawing;
  }

  // One scale for all clusters, so that they can be compared.
  function lineRange(values) {
    let low = Infinity, high = -Infinity;
    for (const v of values.flat()) {
      if (v === null) continue;
      low = Math.min(low, v);
      high = Math.max(high, v);
    }
    return low < high ? [low, high - low] : [Number.isFinite(low) ? low - 0.5 : 0, 1];
  }

  // --- sizes ----------------------------------------------------------------------------------

  function drawSizes(sizes, clusters) {
    const width = 1180, height = 240, left = 56, right = 10, top = 14, bottom = 30;
    const order = sizes.final.map((_, i) => i).sort((a, b) => sizes.final[b] - sizes.final[a]);
    const k = order.length;
    const n = sizes.final.reduce((a, b) => a + b, 0);
    const most = Math.max(sizes.final[order[0]], 1);
    const y = (v) => height - bottom - (v / (1.05 * most)) * (height - top - bottom);
    const pitch = Math.min((width - left - right) / k, 110);
    const drawing = shape("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Final sizes of ${k} clusters: the largest, cluster ${order[0]}, has ` +
        `${sizes.final[order[0]]} examples, the smallest, cluster ${order[k - 1]}, ` +
        `${sizes.final[order[k - 1]]}; the mean is ${number(n / k)}` });
    for (const tick of linearTicks(0, 1.05 * most, 4, true)) {
      drawing.append(shape("line", {
        class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      drawing.append(shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" },
        tick.toLocaleString("en")));
    }
    order.forEach((cluster, place) => {
      const x = left + place * pitch;
      const gap = pitch > 4 ? 0.15 * pitch : 0;
      const size = sizes.final[cluster];
      const bar = withFill(shape("rect", {
        x: x + gap / 2, width: Math.max(pitch - gap, 0.5), y: y(size),
        height: Math.max(height - bottom - y(size), 0) }), clusters[cluster].colour);
      bar.append(shape("title", {}, `${clusters[cluster].name}: ${clusters[cluster].about}`));
      drawing.append(bar);
      if (pitch >= 24) {
        drawing.append(shape("text", {
          x: x + pitch / 2, y: height - bottom + 16, "text-anchor": "middle" }, String(cluster)));
      }
    });
    const mean = shape("line", {
      class: "cursor", x1: left, x2: width - right, y1: y(n / k), y2: y(n / k) });
    drawing.append(mean, shape("text", {
      x: width - right, y: y(n / k) - 5, "text-anchor": "end" }, `n / K = ${number(n / k)}`));
    document.querySelector("#sizes .bars").append(drawing);
  }

  // --- the page -------------------------------------------------------------------------------

  // A part that fails says so and leaves the others alone.
  async function part(id, draw) {
    const section = document.getElementById(id);
    section.hidden = false;
    try {
      await draw(section);
    } catch (error) {
      fail(section.querySelector("h2").textContent, error);
    }
  }

  async function drawPage() {
    const { curves, map, clusters, classes, gallery, sizes } = data;
    if (curves) await part("curves", (section) => drawCurves(section.querySelector(".panels"), curves));
    await part("map", async () => drawMap(map, clusters, classes, await loadSprite(map.sprite)));
    await part("gallery", async () => {
      if (gallery.lines) gallery.lines.range = lineRange(gallery.lines.values);
      drawGallery(gallery, clusters, classes, await loadSprite(gallery.sprite));
    });
    await part("sizes", (section) => {
      if (sizes.panel) drawCurves(section.querySelector(".panels"), sizes.panel);
      drawSizes(sizes, clusters);
    });
    root.dataset.drawn = "yes";
  }
  drawPage();
})();
