// What every widget does: show the HTML that Python wrote, add what comes later, and keep it for whoever looks afterwards.
// Nothing here asks the kernel for anything: while a cell trains, it would not answer.
function initialize({ model }) {
  model.on("change:newest", () => {
    const [key, html, keys] = model.get("newest");
    model.set("pieces", [...model.get("pieces").filter(([other]) => other !== key && keys.includes(other)), [key, html]]);
  });
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "sdpo";
  el.append(root);
  let shown = new Map();
  const add = () => {
    const lens = root.querySelector("[data-sdpo=lens]"), pieces = model.get("pieces"), keys = pieces.map(([key]) => key);
    for (const [key, html] of pieces) {
      if (shown.get(key) !== html) lens.sdpo.add(key, html, keys);
    }
    shown = new Map(pieces);
  };
  const draw = () => {
    const open = new Set([...root.querySelectorAll("details[open] > summary")].map(summary => summary.textContent));
    const focused = root.contains(document.activeElement) && document.activeElement.matches("summary") && document.activeElement.textContent;
    root.innerHTML = model.get("html");
    for (const summary of root.querySelectorAll("summary")) {
      summary.parentElement.open = open.has(summary.textContent);
      if (summary.textContent === focused) summary.focus({ preventScroll: true });
    }
    shown = new Map();
    sdpo.enliven(root);
    add();
  };
  model.on("change:html", draw);
  const follow = () => model.get("pieces").length ? add() : draw();  // none: another run begins
  model.on("change:pieces", follow);
  draw();
  return () => { model.off("change:html", draw); model.off("change:pieces", follow); };
}

export default { initialize, render };
