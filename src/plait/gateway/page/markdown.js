// The little of Markdown that chat answers need: fenced code, inline code, paragraphs. What the model wrote
// enters the document as text nodes only, never as markup.

import { copyButton } from "./copy.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;

// Shows a text that grows: blocks that did not change stay in place, and so do selections in them.
export class GrowingText {
  constructor(container) {
    this.container = container;
    this.blocks = [];
  }

  show(text) {
    const blocks = splitBlocks(text);
    blocks.forEach((block, index) => {
      const shown = this.blocks[index];
      if (shown && shown.kind === block.kind && shown.text === block.text && shown.language === block.language) return;
      const element = block.kind === "code" ? codeElement(block) : paragraphElement(block.text);
      const old = this.container.children[index];
      if (old) old.replaceWith(element);
      else this.container.append(element);
    });
    while (this.container.children.length > blocks.length) this.container.lastElementChild.remove();
    this.blocks = blocks;
  }
}

export function splitBlocks(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const closeParagraph = () => {
    const paragraph = lines.join("\n").replace(/^\n+|\s+$/g, "");
    if (paragraph) blocks.push({ kind: "text", text: paragraph });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const match = FENCE.exec(line);
    if (fence) {
      const closes = match && match[1][0] === fence.mark[0] && match[1].length >= fence.mark.length && !match[2];
      if (closes) {
        blocks.push({ kind: "code", text: lines.join("\n"), language: fence.language });
        lines = [];
        fence = null;
      } else lines.push(line);
    } else if (match) {
      closeParagraph();
      fence = { mark: match[1], language: match[2] };
    } else if (line.trim() === "") closeParagraph();
    else lines.push(line);
  }
  if (fence) blocks.push({ kind: "code", text: lines.join("\n"), language: fence.language });
  else closeParagraph();
  return blocks;
}

function paragraphElement(text) {
  const paragraph = document.createElement("p");
  text.split(/`([^`\n]+)`/).forEach((part, index) => {
    if (index % 2 === 0) {
      paragraph.append(part);
      return;
    }
    const code = document.createElement("code");
    code.textContent = part;
    paragraph.append(code);
  });
  return paragraph;
}

function codeElement(block) {
  const figure = document.createElement("div");
  figure.className = "code";
  const header = document.createElement("header");
  const language = document.createElement("span");
  language.textContent = block.language || "code";
  header.append(language, copyButton(() => block.text));
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const code = document.createElement("code");
  code.textContent = block.text;
  pre.append(code);
  figure.append(header, pre);
  return figure;
}
