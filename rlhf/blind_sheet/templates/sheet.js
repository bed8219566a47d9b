(() => {
  const { byId, make, text } = page;
  const { sheet, questions, items } = JSON.parse(byId("data").textContent);
  const STORE = `pairloop-sheet-${sheet}`;
  const WINNERS = [["a", "A"], ["tie", "Tie"], ["b", "B"], ["?", "Can't tell"]];
  const BARS = [["yes", "Yes"], ["no", "No"], ["?", "Can't tell"]];
  const KEYS = { a: "a", t: "tie", b: "b", x: "?", y: "yes", n: "no" };

  // What a pair is asked: one group of choices a question, and one an answer where there is a bar.
  const groupsOf = (item) => questions.flatMap(({ dimension, bar }) => [
    { item: item.item_id, dimension, choices: WINNERS, asks: "Which is better?" },
    ...(bar ? ["a", "b"] : []).map((side) => ({
      item: `${item.item_id}-${side}`, dimension, choices: BARS, side,
      asks: `${side.toUpperCase()} good enough by itself?`,
    })),
  ]);
  const keyOf = ({ item, dimension }) => JSON.stringify([item, dimension]);
  const groups = items.map(groupsOf);
  const known = new Map(groups.flat().map((group) => [keyOf(group), group]));

  let labels = new Map();
  let at = 0;
  let kept = true;
  const told = byId("told");
  const say = (what, bad = false) => {
    told.textContent = what;
    told.className = bad ? "bad" : "";
  };
  const annotator = byId("annotator");

  const keep = () => {
    try {
      localStorage.setItem(STORE, JSON.stringify({ annotator: annotator.value, at, labels: [...labels] }));
    } catch {
      if (kept) say("This browser keeps nothing: save to a file before you close the page.", true);
      kept = false;
    }
  };
  const recall = () => {
    let found = null;
    try {
      found = JSON.parse(localStorage.getItem(STORE));
    } catch {
      return;
    }
    if (!found) return;
    annotator.value = found.annotator;
    labels = new Map(found.labels.filter(([key]) => known.has(key)));
    at = Math.min(found.at, items.length - 1);
  };

  const isDone = (place) => groups[place].every((group) => labels.has(keyOf(group)));
  const progress = () => {
    const done = items.filter((_, place) => isDone(place)).length;
    byId("progress").max = items.length;
    byId("progress").value = done;
    byId("done").textContent = `${done} of ${items.length} done`;
    byId("open").disabled = done === items.length;
    return done;
  };
  const choose = (group, value) => {
    if (value === null) labels.delete(keyOf(group));
    else labels.set(keyOf(group), value);
    keep();
    const before = byId("progress").value;
    if (progress() === items.length && before < items.length) {
      say("Every pair is done. Save the file and hand it in.");
    }
  };

  // One group of radio buttons.
  const fieldset = (group, number) => {
    const choices = make("div", "choices");
    for (const [value, shown] of group.choices) {
      const input = make("input");
      Object.assign(input, { type: "radio", name: `group-${number}`, value, checked: labels.get(keyOf(group)) === value });
      input.addEventListener("change", () => choose(group, value));
      choices.append(make("label", "", input, make("span", "", shown)));
    }
    const box = make("fieldset", "", make("legend", "", make("span", "hidden", `${group.dimension}: `), group.asks), choices);
    box.dataset.group = number;
    return box;
  };
  const folded = (title, value, open) => {
    const box = make("details", "", make("summary", "", title), text(value, "source"));
    box.open = open;
    return box;
  };
  const scrollable = (box) => {
    box.tabIndex = 0;
    return box;
  };
  const pair = byId("pair");
  const show = () => {
    const item = items[at];
    const here = groups[at];
    const heading = make("h2", "", `Pair ${at + 1} of ${items.length}`);
    heading.tabIndex = -1;
    const parts = [heading, make("h3", "", "Prompt"), scrollable(text(item.prompt, "source"))];
    if (item.context !== undefined) parts.push(folded("Context", item.context, true));
    if (item.reference !== undefined) parts.push(folded("Reference answer", item.reference, false));
    parts.push(make("div", "answers", ...["a", "b"].map((side) => {
      const box = make("article", "", make("h3", "", `Answer ${side.toUpperCase()}`), text(item[`answer_${side}`]));
      box.setAttribute("aria-label", `Answer ${side.toUpperCase()}`);
      return box;
    })));
    const asked = make("div", "questions");
    questions.forEach((question) => {
      const about = make("div", "about", make("b", "", question.dimension));
      if (question.text) about.append(text(question.text));
      const own = here.flatMap((group, number) => group.dimension === question.dimension ? [fieldset(group, number)] : []);
      asked.append(make("div", "question", about, make("div", "groups", ...own)));
    });
    const clear = make("button", "clear", "Clear this pair");
    clear.type = "button";
    clear.addEventListener("click", () => {
      for (const group of here) labels.delete(keyOf(group));
      keep();
      show();
    });
    pair.replaceChildren(...parts, asked, clear);
    byId("place").value = at + 1;
    byId("place").max = items.length;
    byId("of").textContent = ` of ${items.length}`;
    byId("previous").disabled = at === 0;
    byId("next").disabled = at === items.length - 1;
    progress();
    mark();
  };
  const go = (place) => {
    if (place < 0 || place >= items.length) return;
    at = place;
    keep();
    show();
    say("");
    const heading = pair.querySelector("h2");
    heading.focus({ preventScroll: true });
    byId("pair").scrollIntoView({ block: "start" });
  };
  const nextOpen = () => {
    const order = [...items.keys()].map((step) => (at + 1 + step) % items.length);
    const open = order.find((place) => !isDone(place));
    if (open !== undefined) go(open);
  };

  // Keys go to the group that has the focus, else to the first open one.
  const current = () => {
    const boxes = [...pair.querySelectorAll("fieldset")];
    const focused = boxes.find((box) => box.contains(document.activeElement));
    return focused ?? boxes.find((box) => !labels.has(keyOf(groups[at][box.dataset.group]))) ?? null;
  };
  const mark = () => {
    const now = current();
    for (const box of pair.querySelectorAll("fieldset")) box.classList.toggle("now", box === now);
  };
  const take = (value) => {
    const box = current();
    if (!box) return;
    const group = groups[at][box.dataset.group];
    const input = [...box.querySelectorAll("input")].find((one) => one.value === value);
    if (value === null) {
      for (const one of box.querySelectorAll("input")) one.checked = false;
      choose(group, null);
      return;
    }
    if (!input) return;
    input.checked = true;
    choose(group, value);
    const open = [...pair.querySelectorAll("fieldset")].find((one) => !labels.has(keyOf(groups[at][one.dataset.group])));
    (open ? open.querySelector("input") : at < items.length - 1 ? byId("next") : byId("save")).focus();
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=radio]), textarea, select");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "j") go(at + 1);
    else if (key === "k") go(at - 1);
    else if (key === "delete" || key === "backspace") take(null);
    else if (KEYS[key]) take(KEYS[key]);
    else return;
    event.preventDefault();
  });
  document.addEventListener("focusin", mark);
  pair.addEventListener("change", mark);

  // The file: gold labels, a line each, as `pairloop judge calibrate` reads them. Null: can't tell.
  const line = (group, value) => {
    const label = { item_id: group.item, dimension: group.dimension };
    if (group.choices === WINNERS) label.winner = value === "?" ? null : value;
    else label.score = value === "?" ? null : Number(value === "yes");
    label.annotator = annotator.value.trim();
    return `${JSON.stringify(label)}\n`;
  };
  const save = () => {
    const name = annotator.value.trim();
    if (!name) {
      say("Give your name first: it tells the labels of several people apart.", true);
      annotator.focus();
      return;
    }
    const lines = groups.flat().filter((group) => labels.has(keyOf(group)))
      .map((group) => line(group, labels.get(keyOf(group))));
    if (!lines.length) {
      say("There is nothing to save yet.", true);
      return;
    }
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = `gold-${name.replace(/[^\p{L}\p{N}._-]+/gu, "-")}.jsonl`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`Saved ${lines.length} labels as ${link.download}.`);
  };

  const valueOf = (label, number) => {
    const wrong = (what) => new Error(`line ${number}: ${what}`);
    if (label === null || typeof label !== "object") throw wrong("is no label");
    const group = known.get(JSON.stringify([label.item_id, label.dimension]));
    if (!group) throw wrong(`item ${label.item_id}, dimension ${label.dimension} is not asked on this sheet`);
    const said = group.choices === WINNERS ? label.winner : label.score;
    if (said === null) return [keyOf(group), "?"];
    const value = group.choices === WINNERS ? said : said === 1 ? "yes" : said === 0 ? "no" : undefined;
    if (value === "?" || !group.choices.some(([choice]) => choice === value)) throw wrong(`has no label that can be chosen here`);
    return [keyOf(group), value];
  };
  const load = async (file) => {
    const read = (await file.text()).split("\n");
    try {
      const names = new Set();
      const found = read.flatMap((raw, index) => {
        if (!raw.trim()) return [];
        let label;
        try {
          label = JSON.parse(raw);
        } catch {
          throw new Error(`line ${index + 1}: is not JSON`);
        }
        const value = valueOf(label, index + 1);
        names.add(label.annotator ?? "");
        return [value];
      });
      if (names.size > 1) throw new Error(`it holds labels of ${[...names].join(", ")}; one person's at a time`);
      for (const [key, value] of found) labels.set(key, value);
      const [name] = names;
      if (name) annotator.value = name;
      keep();
      show();
      say(`Loaded ${found.length} labels from ${file.name}.`);
    } catch (error) {
      say(`Nothing was loaded from ${file.name}: ${error.message}.`, true);
    }
  };

  annotator.addEventListener("input", keep);
  byId("save").addEventListener("click", save);
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await load(file);
    event.target.value = "";
  });
  byId("previous").addEventListener("click", () => go(at - 1));
  byId("next").addEventListener("click", () => go(at + 1));
  byId("open").addEventListener("click", nextOpen);
  byId("place").addEventListener("change", (event) => {
    const place = Math.round(event.target.valueAsNumber);
    if (place >= 1 && place <= items.length) go(place - 1);
    else event.target.value = at + 1;
  });
  recall();
  document.querySelector("main").hidden = false;
  show();
  if (labels.size) say(`Welcome back: ${labels.size} labels were kept in this browser.`);
  else byId("how").open = true;
})();
