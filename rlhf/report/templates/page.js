(() => {
  const { byId, make, plain, text } = page;

  // Folded numbers are printed, the browser of prompts as it stands.
  addEventListener("beforeprint", () => {
    for (const box of document.querySelectorAll("details.numbers:not([open]), details.funnel:not([open])")) {
      box.open = true;
      box.dataset.unfold = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const box of document.querySelectorAll("details[data-unfold]")) {
      box.open = false;
      delete box.dataset.unfold;
    }
  });

  if (!byId("data")) return;
  const { about, entries } = JSON.parse(byId("data").textContent);
  const PAGE = 25;

  const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(3);

  const marks = (answer) => {
    const list = make("ul", "marks");
    (answer.scores ?? []).forEach((score, i) => {
      const [key, shown] = about.dimensions[i];
      const audit = key !== shown;
      if (score === null && audit) return;
      const low = score !== null && about.floors[key] !== undefined && score < about.floors[key];
      list.append(make("li", low ? "below" : "",
        `${shown} `, make("b", "", score === null ? "no score" : score.toFixed(2)),
        low ? ` (floor ${about.floors[key]})` : "", audit ? " (audit)" : ""));
    });
    return list;
  };

  const answer = (found) => {
    const head = make("div", "head");
    for (const [role, sign, tone] of [["chosen", "▲", "good"], ["rejected", "▼", "bad"]]) {
      if (!found[role]) continue;
      const times = found[role] > 1 ? ` in ${found[role]} pairs` : "";
      head.append(make("span", `tag ${tone}`, `${sign} ${role}${times}`));
    }
    head.append(make("span", "", found.reward === undefined ? "no reward" : `reward ${found.reward.toFixed(3)}`),
      make("span", "", `${found.tokens} tokens${found.cut ? ", cut off" : ""}`),
      make("span", "", `sample ${found.sample}`));
    const box = make("div", `answer ${found.chosen ? "chosen" : found.rejected ? "rejected" : ""}`, head, text(found.text), marks(found));
    for (const reason of found.reasons ?? []) box.append(text(reason, "why"));
    if (found.against && !found.chosen) {
      box.append(make("p", "why", `could not be chosen: ${found.against.join("; ")}`));
    }
    return box;
  };

  const ranked = (answers, pair) => pair
    ? [...answers].sort((a, b) => (b.reward ?? -1) - (a.reward ?? -1) || a.sample - b.sample)
    : answers;

  const inside = (entry) => {
    const box = make("div", "inside");
    if (entry.prompt !== undefined) box.append(make("h4", "", "Prompt"), text(entry.prompt, "source"));
    else box.append(make("p", "note", "This run did not keep the text of this prompt."));
    if (entry.context !== undefined) box.append(make("h4", "", "Context"), text(entry.context, "source"));
    if (entry.reference !== undefined) box.append(make("h4", "", "Reference answer"), text(entry.reference, "source"));
    const columns = (title, key) => {
      if (!entry.groups.some((group) => group[key].length)) return;
      box.append(make("h4", "", title));
      const grid = make("div", entry.groups.length > 1 ? "columns" : "");
      for (const group of entry.groups) {
        const column = make("div", "");
        if (group.title) column.append(make("h4", "", group.title));
        column.append(...ranked(group[key], entry.split !== "gate").map(answer));
        if (!group[key].length) column.append(make("p", "note", "none was kept"));
        grid.append(column);
      }
      box.append(grid);
    };
    columns("Likeliest answer, before and after", "greedy");
    columns(entry.split === "gate" ? "Sampled answers" : "Answers, best first", "answers");
    return box;
  };

  // What tells prompts apart is mostly their end: system message and examples come first.
  const gist = (entry) => {
    const parts = plain(entry.prompt).split(/\n+/).filter((part) => part.trim());
    return parts.length ? parts[parts.length - 1].slice(0, 300) : entry.id;
  };
  const value = (entry) => {
    if (typeof entry.change === "number") {
      const className = entry.change < 0 ? "down" : entry.change > 0 ? "up" : "";
      return make("span", `value ${className}`,
        `${entry.change < 0 ? "▼ " : entry.change > 0 ? "▲ " : ""}${signed(entry.change)}`);
    }
    if (entry.margin !== undefined) {
      const others = entry.pairs > 1 ? `${entry.pairs} pairs, margin up to` : "margin";
      return make("span", "value", `${others} ${entry.margin.toFixed(3)}`);
    }
    return make("span", "value", entry.split === "gate" ? "" : "no pair");
  };
  const card = (entry) => {
    const said = text(gist(entry), "said");
    said.classList.remove("text");
    const where = entry.split === "gate" ? "gate" : `training, round ${entry.split}`;
    const line = text(`${entry.id} · ${entry.category} · ${where}`, "about");
    if (entry.inverted?.length) line.append(" ", make("span", "tag bad", `▼ inverted: ${entry.inverted.join(", ")}`));
    const box = make("details", "prompt", make("summary", "", said, value(entry), line));
    box.addEventListener("toggle", () => {
      if (box.open && box.children.length === 1) box.append(inside(entry));
    });
    return box;
  };

  const words = new Map();
  const haystack = (entry) => {
    if (!words.has(entry)) {
      const all = [entry.id, entry.prompt, entry.context, entry.reference];
      for (const group of entry.groups) {
        for (const found of [...group.answers, ...group.greedy]) all.push(found.text);
      }
      words.set(entry, all.map(plain).join("\n").toLowerCase());
    }
    return words.get(entry);
  };
  const KINDS = {
    worse: (entry) => entry.change < 0,
    better: (entry) => entry.change > 0,
    pair: (entry) => entry.margin !== undefined,
    inverted: (entry) => entry.inverted?.length > 0,
    none: (entry) => entry.split !== "gate" && entry.margin === undefined,
  };

  let matching = [];
  let shown = 0;
  const list = byId("list");
  const more = byId("more");
  const show = () => {
    list.append(...matching.slice(shown, shown + PAGE).map(card));
    shown = Math.min(matching.length, shown + PAGE);
    more.hidden = shown === matching.length;
    byId("count").textContent = matching.length
      ? `${matching.length} of ${entries.length} prompts match; ${shown} listed`
      : `None of ${entries.length} prompts matches`;
  };
  const filter = () => {
    const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const split = byId("split").value;
    const category = byId("category").value;
    const kind = KINDS[byId("show").value] ?? (() => true);
    matching = entries.filter((entry) => (!split || entry.split === split)
      && (!category || entry.category === category)
      && kind(entry)
      && wanted.every((word) => haystack(entry).includes(word)));
    shown = 0;
    list.replaceChildren();
    show();
  };
  byId("filters").hidden = false;
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", filter);
  more.addEventListener("click", show);
  filter();
})();
