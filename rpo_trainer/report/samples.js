// Search and order of the sample list. Without JavaScript the list is complete, worst change first.
(() => {
  const PAGE = 40;
  const find = (id) => document.getElementById(id);
  const list = find("prompts"), cards = [...list.children];
  const entries = cards.map((card) => ({
    card,
    number: Number(card.dataset.number),
    rewards: card.dataset.rewards.split(",").map((text) => (text === "" ? NaN : Number(text))),
    text: card.textContent.toLowerCase(),
    badge: card.querySelector(".change"),
  }));
  let limit = PAGE;

  const signed = (value) =>
    Number.isNaN(value) ? "–" : ["−", "", "+"][Math.sign(value) + 1] + Math.abs(value).toFixed(2);

  function compare() {
    const [from, to, order] = ["from", "to", "order"].map((id) => find(id)?.value);
    if (from === undefined) return;
    const chosen = (id) => find(id).selectedOptions[0].textContent;
    find("compared").textContent = ` from ${chosen("from")} to ${chosen("to")}`;
    for (const entry of entries) {
      entry.change = entry.rewards[to] - entry.rewards[from];
      entry.badge.textContent = signed(entry.change);
      const kind = entry.change > 0 ? "up" : entry.change < 0 ? "down" : "same";
      entry.badge.className = `change ${kind}`;
    }
    const direction = order === "better" ? -1 : 1;
    const rank = (entry) => (Number.isNaN(entry.change) ? Infinity : direction * entry.change);
    entries.sort((a, b) => {
      if (order === "given") return a.number - b.number;
      const [one, other] = [rank(a), rank(b)];
      return one === other ? a.number - b.number : one - other;
    });
    list.append(...entries.map((entry) => entry.card));
  }

  function show() {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = entries.filter((entry) => words.every((word) => entry.text.includes(word)));
    const visible = new Set(found.slice(0, limit));
    for (const entry of entries) entry.card.hidden = !visible.has(entry);
    find("count").textContent =
      found.length === entries.length ? `${found.length} prompts` : `${found.length} of ${entries.length} prompts`;
    find("more-row").hidden = found.length <= limit;
  }

  const again = () => {
    limit = PAGE;
    compare();
    show();
  };
  for (const id of ["from", "to", "order"]) find(id)?.addEventListener("change", again);
  find("search").addEventListener("input", () => {
    limit = PAGE;
    show();
  });
  find("more").addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  find("controls").hidden = false;
  show();
})();
