"use strict";
// Model text reaches the page through textContent alone. Nothing is fetched.
const page = (() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  const theme = byId("theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  name();
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);

  const ODD = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb])/;

  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  };
  const plain = (value) => (Array.isArray(value) ? value[0] : value ?? "");

  // Text as it is: control and invisible characters spelt out, so that none can reorder a line.
  const text = (value, className) => {
    const element = make("div", `text ${className ?? ""}`);
    element.dir = "auto";
    plain(value).split(ODD).forEach((part, i) => {
      if (i % 2) {
        const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        element.append(make("span", "odd", `⟨U+${code}⟩`));
      } else if (part) {
        element.append(part);
      }
    });
    if (Array.isArray(value)) element.append(make("span", "more", ` … ${value[1]} more characters`));
    return element;
  };

  return { byId, make, plain, text };
})();
