// One prompt, two answers side by side, and where they first differ.

import { AnswerView, element, newAnswer, run, speak, textOf } from './answer.js';
import { bind, chatMessages, fields, kept, store } from './settings.js';
import { percent, visible } from './tokens.js';

const KEY = 'tilewright-compare';
const NAMES = ['A', 'B'];
const page = document.getElementById('compare');
const verdict = document.getElementById('verdict');
const choices = { max_tokens: 100, raw: false, sides: [{ temperature: 0 }, { temperature: 0 }], ...kept(KEY, {}) };
const keep = () => store(KEY, choices);
const INTRODUCTION = 'One prompt, two answers. Where they first differ is marked in both.';

const sides = choices.sides.map((values, i) => {
  const made = document.getElementById('side').content.cloneNode(true).firstElementChild;
  made.setAttribute('aria-label', NAMES[i]);
  made.prepend(element('h2', { textContent: NAMES[i] }));
  page.querySelector('.sides').append(made);
  const form = made.querySelector('form');
  bind(form, values, keep);
  return { values, model: form.elements.model, place: made.querySelector('.place'), view: null };
});
bind(document.getElementById('shared'), choices, keep);

export let running = null; // the AbortController of both answers

export const models = () => sides.map((side) => side.values.model);

export function offer(ids) {
  sides.forEach(({ values, model }, i) => {
    model.replaceChildren(...ids.map((id) => new Option(id)));
    if (!ids.includes(values.model)) values.model = ids[Math.min(i, ids.length - 1)];
    model.value = values.model;
  });
}

// The piece of an answer that holds a place of its text: {piece, start, count: tokens before it}.
function pieceAt(answer, place) {
  let start = 0;
  let count = 0;
  for (const piece of answer.pieces) {
    if (place < start + piece.text.length) return { piece, start, count };
    start += piece.text.length;
    count += piece.tokens.length;
  }
  return { piece: null, start, count };
}

// Where two answers first differ: {at: [pieceAt of each]}, or null as long as they do not.
export function firstDifference(answers) {
  const texts = answers.map(textOf);
  let place = 0;
  while (place < texts[0].length && texts[0][place] === texts[1][place]) place++;
  const ended = answers.map((answer, i) => place === texts[i].length);
  if (ended[0] && ended[1]) return null;
  // One that is still being written, or was cut, says nothing about what would follow.
  if (answers.some((answer, i) => ended[i] && answer.finish !== 'stop')) return null;
  return { at: answers.map((answer) => pieceAt(answer, place)) };
}

const name = (token) => element('code', { textContent: visible(token.bytes) });

// What one side wrote there, and how probable it found what the other wrote.
function sentence(who, mine, other, theirs) {
  const line = element('p', {}, `${who} `);
  if (!mine.piece) {
    line.append('ends there.');
    return line;
  }
  const token = mine.piece.tokens[0];
  if (!token) {
    line.append('wrote ', element('code', { textContent: mine.piece.text }), '.');
    return line;
  }
  line.append('wrote ', name(token), ` (${percent(token.logprob)})`);
  const wanted = theirs.piece?.tokens[0];
  if (wanted && theirs.start === mine.start) {
    const found = token.top.find(([bytes]) => bytes === wanted.bytes);
    if (found) line.append(` and gave ${other}’s `, name(wanted), ` ${percent(found[1])}`);
    else line.append(`; ${other}’s `, name(wanted), ` is not among its ${token.top.length} likeliest`);
  }
  line.append('.');
  return line;
}

function judge(done) {
  if (sides.some((side) => !side.view)) return; // cleared
  const answers = sides.map((side) => side.view.answer);
  const difference = firstDifference(answers);
  if (difference && !verdict.childElementCount) {
    const [a, b] = difference.at;
    verdict.replaceChildren(
      element('p', {}, element('strong', { textContent: `They first differ at token ${Math.min(a.count, b.count) + 1}.` })),
      sentence('A', a, 'B', b),
      sentence('B', b, 'A', a),
    );
  }
  if (difference) {
    sides.forEach(({ view }, i) => {
      const span = view.tokenText.spanOf.get(difference.at[i].piece);
      span?.classList.add('differs');
      view.text.classList.toggle('ends', !difference.at[i].piece);
    });
  } else if (done && !answers.some((answer) => answer.error)) {
    const same = textOf(answers[0]) === textOf(answers[1]);
    verdict.textContent = same ? 'The two answers are the same.' : 'The two answers are the same as far as both go.';
  }
}

export async function ask(content) {
  const controller = (running = new AbortController());
  verdict.replaceChildren();
  const requests = sides.map((side) => {
    const { values } = side;
    const answer = newAnswer(values.model);
    side.view = new AnswerView(answer, true);
    side.place.replaceChildren(side.view.element);
    const body = {
      model: values.model,
      ...fields({ ...values, max_tokens: choices.max_tokens }, !choices.raw, true),
      ...(choices.raw ? { prompt: content } : { messages: chatMessages(values, [{ role: 'user', content }]) }),
    };
    return [side.view, choices.raw ? 'v1/completions' : 'v1/chat/completions', body, controller.signal];
  });
  for (const { view } of sides) view.drawn = () => judge(false);
  await Promise.all(requests.map((request) => run(...request)));
  if (running === controller) running = null;
  judge(true);
  speak(verdict.textContent);
}

export const failed = () => sides.map((side) => side.view?.answer.error).find(Boolean);

export function clear() {
  running?.abort();
  for (const side of sides) {
    side.view = null;
    side.place.replaceChildren();
  }
  introduce();
}

function introduce() {
  verdict.replaceChildren(element('p', { className: 'small', textContent: INTRODUCTION }));
}
introduce();
