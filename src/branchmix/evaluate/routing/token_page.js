// The page of `branchmix routes`. Shapes: L layers of a kind of router, T shown tokens, M experts kept of a token.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("routes-data").textContent);
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  for (const kind of Object.values(data.kinds)) {
    const index = bytes(kind.index);
    kind.indexLTM = kind.wide ? new Uint16Array(index.buffer) : index;
    kind.gatesLTM = bytes(kind.gates);
  }
  const total = data.texts.reduce((sum, text) => sum + text.pieces.length, 0);
  const state = { kind: Object.keys(data.kinds)[0], layer: 0, only: null, at: null };
  const colour = (expert) => data.colours[expert % data.colours.length];
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
  const named = (expert) => (data.experts[expert] === String(expert) ? `expert ${expert}` : `${expert} ${data.experts[expert]}`);
  const make = (tag, options = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), options);
    element.append(...children);
    return element;
  };
  const swatch = (expert) => {
    const dot = make("span", { className: "swatch" });
    dot.style.setProperty("--c", colour(expert));
    return dot;
  };

  /** Experts of a shown token in a layer (its place among the kind's), the chosen and strongest first: [[expert, p]]. */
  const gatesOf = (kindName, layer, token) => {
    const kind = data.kinds[kindName];
    const start = (layer * total + token) * kind.kept;
    return Array.from({ length: kind.kept }, (_, m) => [kind.indexLTM[start + m], kind.gatesLTM[start + m] / 255]);
  };
  const shown = (piece) => (piece === "" ? "(part of a character)" : piece.replace(/\n/g, "⏎").replace(/ /g, "␣"));

  // ---- the text ----

  const tokens = [];
  const owners = [];
  data.texts.forEach((text, number) => {
    const block = make("div", { className: "document" });
    block.dataset.domain = text.domain;
    const size = `${text.pieces.length.toLocaleString("en")} tokens${text.cut ? ", the beginning of it" : ""}`;
    block.append(make("h3", {}, `${text.domain}, text ${text.number}`, make("small", { className: "note" }, size)));
    const body = make("div", { className: "tokens", role: "group" });
    body.setAttribute("aria-label", `${text.domain}, text ${text.number}: use the arrow keys to go from token to token`);
    for (const piece of text.pieces) {
      const span = make("span", { className: "t", tabIndex: -1 }, piece);
      span.classList.toggle("nl", piece.includes("\n"));
      span.classList.toggle("part", piece === "");
      span.dataset.n = tokens.length;
      tokens.push(span);
      owners.push(number);
      body.append(span);
    }
    if (body.firstChild) body.firstChild.tabIndex = 0;
    block.append(body);
    $("text").append(block);
  });

  const paint = () => {
    const kind = data.kinds[state.kind];
    const even = 1 / kind.experts;
    for (let token = 0; token < total; token++) {
      const gates = gatesOf(state.kind, state.layer, token);
      const [first, most] = gates[0];
      const stops = [];
      let from = 0;
      for (const [expert, share] of gates) {
        const to = Math.min(1, from + share);
        stops.push(`${colour(expert)} ${(100 * from).toFixed(1)}% ${(100 * to).toFixed(1)}%`);
        from = to;
      }
      if (from < 1) stops.push(`transparent ${(100 * from).toFixed(1)}%`);
      const sure = Math.max(0, (most - even) / (1 - even || 1));
      const span = tokens[token];
      span.dataset.e = first;
      span.style.setProperty("--c", colour(first));
      span.style.setProperty("--a", Math.sqrt(sure).toFixed(3));
      span.style.setProperty("--mix", `linear-gradient(to right, ${stops.join(", ")})`);
      span.classList.toggle("dim", state.only !== null && first !== state.only);
    }
  };

  // ---- the controls around it ----

  const legend = () => {
    const kind = data.kinds[state.kind];
    const layer = kind.layers[state.layer];
    const focused = document.activeElement?.dataset?.expert;
    $("experts").replaceChildren(
      ...Array.from({ length: kind.experts }, (_, expert) => {
        const button = make("button", { type: "button" }, swatch(expert), `${named(expert)} ${percent(layer.load[expert])}`);
        button.dataset.expert = expert;
        button.setAttribute("aria-pressed", state.only === expert);
        button.onclick = () => {
          state.only = state.only === expert ? null : expert;
          update();
        };
        return make("li", {}, button);
      }),
    );
    $("experts").classList.toggle("many", kind.experts > 16);
    if (focused !== undefined) $("experts").querySelector(`[data-expert="${focused}"]`)?.focus();
  };

  const fact = (title, value, small) => make("div", {}, make("dt", {}, title), make("dd", {}, value, make("small", {}, small)));
  const facts = () => {
    const kind = data.kinds[state.kind];
    const layer = kind.layers[state.layer];
    const most = Math.log2(kind.experts).toFixed(2);
    const parts = [
      fact("How even the load is", layer.load_entropy.toFixed(2), ` of ${most} bits`),
      fact("Busiest expert above its fair share", percent(layer.max_violation), `; dead experts: ${layer.dead_experts}`),
      fact("How undecided a token's gate is", layer.token_entropy.toFixed(2), ` of ${most} bits`),
    ];
    if (layer.bias_spread !== null) parts.push(fact("Biases of the choice are apart by", layer.bias_spread.toFixed(3), " (gates are between 0 and 1)"));
    if (layer.mutual_information !== null) {
      const corrected = layer.mutual_information_corrected.toFixed(3);
      const limit = Math.log2(Math.min(data.domains.length, kind.experts)).toFixed(2);
      parts.push(fact("What the expert tells of the domain", corrected, ` of ${limit} bits (${layer.mutual_information.toFixed(3)} before correction)`));
    }
    const pair = data.agreement.find((other) => other.layer === layer.layer);
    if (pair) {
      const words = ` of tokens, ${percent(pair.same_by_chance)} by chance; overlap ${pair.overlap.toFixed(2)}`;
      parts.push(fact("FFN and attention prefer the same expert", percent(pair.same), words));
    }
    $("facts").replaceChildren(...parts);
  };

  const head = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => {
    const cell = make("th", { scope: "col" });
    cell.append(name);
    return cell;
  })));
  const withSwatch = (expert) => {
    const words = document.createDocumentFragment();
    words.append(swatch(expert), named(expert));
    return words;
  };
  const tables = () => {
    const kind = data.kinds[state.kind];
    const layer = kind.layers[state.layer];
    const all = Array.from({ length: kind.experts }, (_, expert) => expert);
    const greatest = Math.max(...Object.values(layer.by_domain).flat(), 1e-9);
    const rows = Object.entries(layer.by_domain).map(([domain, shares]) => make("tr", {}, make("th", { scope: "row" }, domain),
      ...shares.map((share, expert) => {
        const cell = make("td", {}, percent(share));
        cell.style.setProperty("--c", colour(expert));
        cell.style.setProperty("--a", (share / greatest).toFixed(3));
        return cell;
      })));
    $("shares").replaceChildren(head("", ...all.map(withSwatch)), make("tbody", {}, ...rows));
    $("typical").replaceChildren(head("expert", "tokens, and how often they go there"), make("tbody", {}, ...all.map((expert) => {
      const cell = make("td");
      for (const [token, share, count] of layer.typical[expert]) {
        const word = make("code", { title: `${percent(share)} of ${count}` }, shown(token));
        cell.append(word, make("small", { className: "note" }, `${percent(share)} `), " ");
      }
      if (!layer.typical[expert].length) cell.append(make("small", { className: "note" }, "none: it gets no kind of token more than others do"));
      return make("tr", {}, make("th", { scope: "row" }, withSwatch(expert)), cell);
    })));
  };

  const inspect = (token, aloud) => {
    if (state.at !== null) tokens[state.at].classList.remove("at");
    state.at = token;
    if (token === null) return;
    tokens[token].classList.add("at");
    const text = data.texts[owners[token]];
    const first = owners.indexOf(owners[token]);
    const piece = text.pieces[token - first];
    const where = `token ${token - first + 1} of ${text.pieces.length}, ${text.domain}, text ${text.number}`;
    $("word").replaceChildren(
      make("span", {}, make("span", { className: "word" }, shown(piece)), ` ${where}`),
      make("small", {}, "strongest expert, layer by layer"),
    );
    const said = [];
    const here = data.kinds[state.kind].layers[state.layer].layer;
    const rows = [];
    for (const [name, kind] of Object.entries(data.kinds)) {
      const place = kind.layers.findIndex((layer) => layer.layer === here);
      if (place < 0) continue;
      const gates = gatesOf(name, place, token);
      const stack = make("span", { className: "stack" });
      for (const [expert, share] of gates) {
        const part = make("i");
        part.style.setProperty("--c", colour(expert));
        part.style.width = `${100 * share}%`;
        stack.append(part);
      }
      const parts = gates.map(([expert, share], m) => `${m < kind.top_k && !kind.soft ? "→ " : ""}${named(expert)} ${share.toFixed(2)}`);
      const strip = make("span", { className: "strip" });
      kind.layers.forEach((layer, l) => {
        const part = make("i", { className: l === place ? "now" : "" });
        const [strongest] = gatesOf(name, l, token)[0];
        part.style.setProperty("--c", colour(strongest));
        part.title = `layer ${layer.layer}: ${named(strongest)}`;
        strip.append(part);
      });
      const label = make("span", { className: name === state.kind ? "now-kind" : "" }, kind.title);
      rows.push(label, stack, make("span", { className: "said", title: parts.join(", ") }, parts.join(" · ")), strip);
      said.push(`${kind.title}: ${parts.slice(0, 4).join(", ")}`);
    }
    $("gates").replaceChildren(...rows);
    if (aloud) $("aloud").textContent = `${shown(piece)}. Layer ${here}. ${said.join(". ")}`;
  };

  const update = () => {
    const kind = data.kinds[state.kind];
    const slider = $("layer");
    slider.max = kind.layers.length - 1;
    slider.value = state.layer;
    const number = kind.layers[state.layer].layer;
    $("layer-now").textContent = `layer ${number}, of ${kind.layers[0].layer} to ${kind.layers.at(-1).layer}`;
    slider.setAttribute("aria-valuetext", `layer ${number}`);
    for (const title of document.querySelectorAll(".here")) title.textContent = `${kind.title}, layer ${number}`;
    paint();
    legend();
    facts();
    tables();
    if (state.at !== null) inspect(state.at, document.activeElement === tokens[state.at]);
  };
  const goTo = (layer) => {
    state.layer = Math.max(0, Math.min(data.kinds[state.kind].layers.length - 1, layer));
    update();
  };
  const switchTo = (name) => {
    const here = data.kinds[state.kind].layers[state.layer].layer;
    state.kind = name;
    const place = data.kinds[name].layers.findIndex((layer) => layer.layer >= here);
    $(`kind-${name}`).checked = true;
    goTo(place < 0 ? data.kinds[name].layers.length - 1 : place);
  };

  // ---- hands on it ----

  let waiting = false; // a slider that is dragged says more than can be painted
  $("layer").addEventListener("input", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      goTo(Number($("layer").value));
    });
  });
  for (const name of Object.keys(data.kinds)) $(`kind-${name}`).addEventListener("change", () => switchTo(name));
  $("numbers").addEventListener("change", (event) => $("text").classList.toggle("numbers", event.target.checked));
  $("domain").addEventListener("change", (event) => {
    for (const block of document.querySelectorAll(".document")) {
      block.hidden = event.target.value !== "" && block.dataset.domain !== event.target.value;
    }
  });
  const tokenOf = (event) => (event.target.classList?.contains("t") ? Number(event.target.dataset.n) : null);
  $("text").addEventListener("pointerover", (event) => {
    if (tokenOf(event) !== null) inspect(tokenOf(event), false);
  });
  $("text").addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token === null) return;
    for (const other of event.target.parentNode.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    event.target.tabIndex = 0;
    inspect(token, true);
  });
  /** The token of the next line (direction 1) or the one before (-1) that is nearest to the left edge of this one. */
  const inLine = (token, direction) => {
    const edge = tokens[token].getClientRects()[0];
    let best = null;
    let line = null;
    for (let other = token + direction; owners[other] === owners[token]; other += direction) {
      const box = tokens[other].getClientRects()[0];
      if (!box || Math.abs(box.top - edge.top) < 3) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 3) break;
      if (best === null || Math.abs(box.left - edge.left) < best[1]) best = [other, Math.abs(box.left - edge.left)];
    }
    return best === null ? token : best[0];
  };
  $("text").addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (token === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const first = owners.indexOf(owners[token]);
    const last = owners.lastIndexOf(owners[token]);
    const kinds = Object.keys(data.kinds);
    const to = {
      ArrowRight: () => Math.min(last, token + 1), ArrowLeft: () => Math.max(first, token - 1),
      ArrowDown: () => inLine(token, 1), ArrowUp: () => inLine(token, -1), Home: () => first, End: () => last,
    }[event.key];
    if (to) tokens[to()].focus();
    else if (event.key === "]" || event.key === "[") goTo(state.layer + (event.key === "]" ? 1 : -1));
    else if (event.key === "r") switchTo(kinds[(kinds.indexOf(state.kind) + 1) % kinds.length]);
    else return;
    event.preventDefault();
  });

  const most = Math.max(...Object.values(data.kinds).map((kind) => kind.experts));
  $("numbers").checked = most > data.colours.length;
  $("text").classList.toggle("numbers", $("numbers").checked);
  state.layer = Math.floor(data.kinds[state.kind].layers.length / 2);
  update();
  if (total) inspect(0, false);
})();
