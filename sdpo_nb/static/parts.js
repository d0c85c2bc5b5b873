// Brings the parts of a report or of a widget to life. Everything that can be read is in the HTML already; this adds choosing a token,
// moving between steps, changing the colours, finding attempts, and reading values off a curve. Model output reaches the page escaped
// by view.lens.tag, or as textContent.
const sdpo = (() => {
  "use strict";

  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  // The same words as view.style.percent.
  const percent = p => p === null ? "not listed" : p > 0 && p < 0.0005 ? "<0.1%" : p >= 0.9995 && p < 1 ? ">99.9%"
    : p === 0 || p === 1 ? `${100 * p}%` : `${(100 * p).toFixed(1)}%`;
  const signed = x => x === null ? "?" : (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);

  const side = p => {
    const bar = make("i");
    bar.style.setProperty("--p", p === null ? 0 : p);
    return make("td", {}, make("div", {}, bar, make("span", { textContent: percent(p) })));
  };

  // The same table as view.lens.opinion_html.
  function showOpinion(panel, token) {
    const [name, credit, kl, divergence, rows] = token, figure = x => x === null ? "?" : x.toFixed(2);
    panel.querySelector(".about").replaceChildren(
      make("span", { textContent: `credit ${signed(credit)}` }),
      make("span", { textContent: `KL ${figure(kl)}` }),
      make("span", { textContent: `divergence ${figure(divergence)}` }));
    panel.querySelector("tbody").replaceChildren(...rows.map(([text, student, teacher, kind]) =>
      make("tr", { className: kind }, side(student), make("th", { scope: "row", textContent: text, title: text }), side(teacher))));
    panel.querySelector("caption").textContent = `Both opinions where the attempt says ${name}`;
  }

  function attempt(card) {
    const tokens = [...card.querySelectorAll(".token")];
    if (!tokens.length) return;
    const data = JSON.parse(card.querySelector("script[type='application/json']").textContent);
    const panel = card.querySelector(".opinion");
    let pinned = Math.max(0, tokens.findIndex(token => token.classList.contains("chosen")));
    let shown = pinned;
    const show = i => {
      showOpinion(panel, data[i]);
      tokens[shown].classList.remove("chosen");
      tokens[i].classList.add("chosen");
      shown = i;
    };
    const pin = i => {
      tokens[pinned].tabIndex = -1;
      tokens[pinned].setAttribute("aria-pressed", "false");
      pinned = i;
      tokens[i].tabIndex = 0;
      tokens[i].setAttribute("aria-pressed", "true");
      show(i);
    };
    const group = card.querySelector(".tokens"), place = event => tokens.indexOf(event.target.closest(".token"));
    tokens.forEach(token => { token.tabIndex = -1; });
    let isPinned = false;  // by the reader
    for (const kind of ["click", "focusin"]) {
      group.addEventListener(kind, event => { if (place(event) >= 0) { pin(place(event)); isPinned = true; } });
    }
    group.addEventListener("pointerover", event => { if (event.pointerType === "mouse" && place(event) >= 0) show(place(event)); });
    group.addEventListener("pointerleave", () => show(pinned));
    group.addEventListener("keydown", event => {
      const to = { ArrowRight: pinned + 1, ArrowLeft: pinned - 1, ArrowDown: pinned + 1, ArrowUp: pinned - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      tokens[Math.min(tokens.length - 1, Math.max(0, to))].focus();
    });
    pin(pinned);
    const words = [".question", ".verdict"].map(part => card.querySelector(part).textContent);
    card.sdpo = { text: [words[0], data.map(([name]) => name).join(""), words[1]].join("\n"), pinned: () => isPinned ? pinned : null, pin: i => { if (i < tokens.length) { pin(i); isPinned = true; } } };
  }

  // Steps of which one is shown. A report brings them all in its HTML; a widget adds them as they come, and they wait as text.
  function lens(root) {
    root.classList.add("alive");
    // To JupyterLab: a key that is pressed here is not meant for the notebook.
    root.addEventListener("focusin", event => { event.target.dataset.lmSuppressShortcuts = "true"; });
    const buttons = [...root.querySelectorAll(".switch button")];
    buttons.forEach(button => button.addEventListener("click", () => {
      root.dataset.colour = button.value;
      buttons.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
    }));
    const holder = root.querySelector(".steps"), slider = root.querySelector(".slide input"), output = root.querySelector(".slide output");
    const search = root.querySelector("input[type=search]"), kinds = root.querySelector(".kinds"), none = root.querySelector(".none-found");
    const steps = [...holder.children].map(element => ({ key: Number(element.dataset.step), element }));
    let at = 0, follows = false;
    const cards = () => [...(steps[at]?.element?.querySelectorAll("article") ?? [])];
    const sift = () => {
      const words = search.value.toLowerCase();
      for (const card of cards()) {
        const text = card.sdpo?.text ?? card.textContent;
        card.hidden = !(` ${card.dataset.kinds} `.includes(` ${kinds.value} `) && text.toLowerCase().includes(words));
      }
      none.hidden = !cards().length || cards().some(card => !card.hidden);
    };
    const places = () => ({
      pinned: cards().map(card => [card.dataset.asked, card.sdpo?.pinned()]),
      focused: cards().findIndex(card => card.querySelector(".tokens")?.contains(document.activeElement)),
    });
    const show = (i, { pinned, focused } = places()) => {
      for (const step of steps) {
        if (step.html === undefined) step.element.hidden = true;
        else if (step.element) { step.element.remove(); step.element = undefined; }
      }
      at = i;
      const step = steps[at];
      if (!step) return;
      if (!step.element) {
        step.element = parse(step.html);
        holder.append(step.element);
        enliven(holder);
      }
      step.element.hidden = false;
      cards().forEach((card, j) => { if (pinned[j]?.[0] === card.dataset.asked && pinned[j][1] != null) card.sdpo?.pin(pinned[j][1]); });
      cards()[focused]?.querySelector(".token[tabindex='0']")?.focus({ preventScroll: true });
      sift();
      slider.max = Math.max(0, steps.length - 1);
      slider.value = at;
      slider.closest(".slide").hidden = steps.length < 2;
      slider.setAttribute("aria-valuetext", `step ${step.key}`);
      output.textContent = `step ${step.key}`;
    };
    slider.addEventListener("input", () => { follows = Number(slider.value) === steps.length - 1; show(Number(slider.value)); });
    search.addEventListener("input", sift);
    kinds.addEventListener("change", sift);
    root.sdpo = {
      // Another step, or another look at the last one; those that are not in `keys` go. Whoever looks at the newest sees it at once.
      add(key, html, keys) {
        const seen = steps[at]?.key, left = places(), known = steps.findIndex(step => step.key === key);
        if (known >= 0) { steps[known].element?.remove(); steps[known] = { key, html }; } else steps.push({ key, html });
        for (const step of steps.filter(step => !keys.includes(step.key))) {
          step.element?.remove();
          steps.splice(steps.indexOf(step), 1);
        }
        steps.sort((one, other) => one.key - other.key);
        const far = step => Math.abs(step.key - seen), nearest = steps.reduce((best, step) => far(step) < far(best) ? step : best, steps[0]);
        show(follows ? steps.length - 1 : steps.indexOf(nearest), left);
        follows ||= steps.length === 1;
      },
    };
    if (steps.length) show(0);
  }

  function curve(figure) {
    const series = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const measured = series.filter(line => line.kind === "main").flatMap(line => line.points.map(point => point[0]));
    const places = [...new Set(measured)].sort((a, b) => a - b);
    const readout = figure.querySelector(".readout");
    let at = places.length - 1;
    const nearest = x => places.reduce((best, place, i) => Math.abs(place - x) < Math.abs(places[best] - x) ? i : best, 0);
    for (const drawing of figure.querySelectorAll(".drawing")) {
      const { left, right, last } = Object.fromEntries(["left", "right", "last"].map(name => [name, Number(drawing.dataset[name])]));
      const cursor = drawing.querySelector(".cursor");
      const show = i => {
        at = Math.min(places.length - 1, Math.max(0, i));
        const x = left + (right - left) * places[at] / (last || 1);
        cursor.setAttribute("x1", x);
        cursor.setAttribute("x2", x);
        cursor.removeAttribute("visibility");
        const values = series.flatMap(line => line.points.filter(point => point[0] === places[at]).map(point => [line.name, point[1]]));
        readout.replaceChildren(make("span", { className: "quiet", textContent: `${places[at].toLocaleString("en")} attempts` }),
          ...values.map(([name, value]) => make("div", {}, make("span", { textContent: name }), make("b", { textContent: percent(value) }))));
        readout.hidden = false;
        const scale = drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
        const room = figure.clientWidth - readout.offsetWidth;
        readout.style.top = `${drawing.getBoundingClientRect().top - figure.getBoundingClientRect().top + 24 * scale}px`;
        readout.style.left = `${Math.max(0, x * scale + 14 > room ? Math.min(room, x * scale - readout.offsetWidth - 14) : x * scale + 14)}px`;
      };
      const hide = () => { readout.hidden = true; cursor.setAttribute("visibility", "hidden"); };
      drawing.tabIndex = 0;
      drawing.addEventListener("pointermove", event => {
        const box = drawing.getBoundingClientRect();
        const x = (event.clientX - box.left) * drawing.viewBox.baseVal.width / box.width;
        show(nearest((x - left) / (right - left) * last));
      });
      drawing.addEventListener("pointerleave", hide);
      drawing.addEventListener("focus", () => show(at));
      drawing.addEventListener("blur", hide);
      drawing.addEventListener("keydown", event => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        show(at + step);
      });
    }
  }

  const parts = { attempt, lens, curve };

  function parse(html) {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.firstElementChild;
  }

  function enliven(root) {
    for (const element of root.querySelectorAll("[data-sdpo]:not([data-ready])")) {
      element.dataset.ready = "";
      parts[element.dataset.sdpo](element);
    }
  }

  return { enliven };
})();
