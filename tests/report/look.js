// Runs in the page: what is empty, wider than the window, cut off, or over something else.
() => {
  const visible = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const name = (e) => `${e.tagName.toLowerCase()} ${(e.textContent || "").trim().slice(0, 40)}`;
  const found = { empty: [], wide: [], cut: [], overlapping: [], overlapping_labels: [] };

  if (document.documentElement.scrollWidth > innerWidth)
    found.wide.push(`the page: ${document.documentElement.scrollWidth} of ${innerWidth} pixels`);
  for (const e of document.querySelectorAll("h1, h2, h3, p, li, dt, dd, th, figcaption, section, pre"))
    if (visible(e) && !e.textContent.trim() && !(e.tagName === "TH")) found.empty.push(name(e));

  // Labels of figures, as oriented rectangles: some are turned.
  const corners = (label) => {
    const box = label.getBBox(), matrix = label.getScreenCTM();
    const shrink = box.height * 0.15; // the line's height has room above and below the letters
    const ends = [
      [box.x, box.y + shrink], [box.x + box.width, box.y + shrink],
      [box.x + box.width, box.y + box.height - shrink], [box.x, box.y + box.height - shrink],
    ];
    return ends.map(([x, y]) => new DOMPoint(x, y).matrixTransform(matrix));
  };
  const apart = (a, b) => {
    for (const shape of [a, b])
      for (let i = 0; i < 4; i++) {
        const p = shape[i], q = shape[(i + 1) % 4];
        const normal = [q.y - p.y, p.x - q.x], length = Math.hypot(...normal) || 1;
        const along = (points) => points.map((c) => (c.x * normal[0] + c.y * normal[1]) / length);
        const [one, other] = [along(a), along(b)];
        if (Math.max(...one) <= Math.min(...other) + 0.5) return true;
        if (Math.max(...other) <= Math.min(...one) + 0.5) return true;
      }
    return false;
  };
  const figures = [...document.querySelectorAll("figure")].filter(visible);
  for (const figure of figures) {
    const svg = figure.querySelector("svg"), title = name(figure.querySelector("figcaption"));
    const frame = svg.getBoundingClientRect();
    const marks = svg.querySelectorAll("path[clip-path], g[clip-path], use").length;
    if (frame.width < 150 || frame.height < 80 || !marks) found.empty.push(`figure ${title}`);
    if (frame.right > innerWidth + 1) found.wide.push(`figure ${title}`);
    const labels = [...svg.querySelectorAll("text")].map((e) => [e.textContent, corners(e)]);
    if (labels.length < 3) found.empty.push(`labels of figure ${title}`);
    labels.forEach(([text, shape], i) => {
      const out = shape.some(
        (c) => c.x < frame.left - 1 || c.x > frame.right + 1 || c.y < frame.top - 1 || c.y > frame.bottom + 1,
      );
      if (out) found.cut.push(`${title}: ${text}`);
      for (const [other, its] of labels.slice(i + 1))
        if (!apart(shape, its)) found.overlapping_labels.push(`${title}: ${text} and ${other}`);
    });
  }

  // Words of a table's heads are whole, but for such as no column has room for.
  for (const head of document.querySelectorAll("th"))
    for (const word of head.textContent.matchAll(/\S+/g)) {
      const range = document.createRange();
      if (word[0].length > 16 || word[0].includes("-") || !visible(head)) continue;
      range.setStart(head.firstChild, word.index);
      range.setEnd(head.firstChild, word.index + word[0].length);
      if (range.getClientRects().length > 1) found.cut.push(`head ${word[0]}`);
    }

  // Lines of text of the page itself.
  const lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const owner = node.parentElement;
    if (!node.textContent.trim() || owner.closest("svg, style, script") || !visible(owner)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.width < 1) continue;
      lines.push({ node, box, text: node.textContent.trim().slice(0, 30) });
      const inside = owner.closest(".scroll, pre");
      if (!inside && (box.right > innerWidth + 1 || box.left < -1)) found.cut.push(name(owner));
      const card = owner.closest(".card");
      if (!inside && card && box.right > card.getBoundingClientRect().right + 1)
        found.cut.push(name(owner));
    }
  }
  lines.sort((a, b) => a.box.top - b.box.top);
  lines.forEach((a, i) => {
    for (let k = i + 1; k < lines.length && lines[k].box.top < a.box.bottom; k++) {
      const b = lines[k];
      const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const down = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      // Lines of one paragraph may touch; letters of two texts must not.
      if (across > 1 && down > 0.35 * Math.min(a.box.height, b.box.height))
        found.overlapping.push(`${a.text} | ${b.text}`);
    }
  });

  // The weakest contrast of the page's text colors with what is behind them.
  const probe = document.body.appendChild(document.createElement("span"));
  const light = (variable) => {
    probe.style.color = `var(${variable})`;
    const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3);
    const [r, g, b] = parts.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const back = ["--page", "--card"].map(light);
  const front = ["--ink", "--muted", "--first", "--good", "--warn", "--bad"].map(light);
  probe.remove();
  return {
    ...found,
    figures: figures.length,
    texts: lines.length,
    background: back[0],
    contrast: Math.min(...back.flatMap((b) => front.map((f) => ratio(f, b)))),
  };
}
