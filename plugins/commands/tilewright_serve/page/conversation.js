// The conversation with one model, through its chat template or as raw completions.

import { AnswerView, element, newAnswer, run, textOf } from './answer.js';
import { chatMessages, fields, kept, settings, store } from './settings.js';

const KEY = 'tilewright-conversations';
const place = document.getElementById('conversation');

const conversations = { chat: [], completion: [], ...kept(KEY, {}) };
let mode = 'chat';
const views = new WeakMap(); // of answers
let last = null; // {mode, messages}: what `clear` removed
export let running = null; // the AbortController of the answer that is being written
const listeners = [];

export function onChange(listener) {
  listeners.push(listener);
}
const changed = () => listeners.forEach((listener) => listener());

// Probabilities of tens of thousands of tokens are more than a browser keeps: then the text alone.
function save() {
  store(KEY, conversations) || store(KEY, conversations, (name, value) => (name === 'tokens' ? [] : value));
}
addEventListener('beforeunload', () => running?.abort()); // else its connection breaks, which is an error
addEventListener('pagehide', save);
document.addEventListener('visibilitychange', save);

const messages = () => conversations[mode];

function button(text, act) {
  const made = element('button', { type: 'button', textContent: text });
  made.addEventListener('click', () => act(made));
  return made;
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = 'Copied';
  } catch {
    from.textContent = 'Not copied';
  }
  setTimeout(() => (from.textContent = 'Copy'), 1500);
}

function edit(index, article) {
  const message = messages()[index];
  const field = element('textarea', { value: message.content, rows: Math.min(12, message.content.split('\n').length + 1) });
  field.setAttribute('aria-label', 'Your message');
  const send = () => {
    if (!field.value.trim()) return;
    messages().length = index;
    ask(field.value, models.selected());
  };
  field.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') draw();
    else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  article.replaceChildren(field, element('div', { className: 'actions' }, button('Send', send), button('Cancel', draw)));
  field.focus();
}

export const models = { selected: () => '' }; // set by page.js

function viewOf(answer) {
  if (!views.has(answer)) views.set(answer, new AnswerView(answer, settings.probabilities));
  return views.get(answer);
}

function article(message) {
  const user = message.role === 'user';
  const name = user ? (mode === 'chat' ? 'You' : 'Prompt') : message.model;
  const text = user ? element('div', { className: 'plain', textContent: message.content }) : viewOf(message).element;
  const made = element('article', { className: message.role }, text, element('div', { className: 'actions' }));
  if (!user) made.prepend(element('p', { className: 'small who', textContent: name }));
  made.setAttribute('aria-label', name);
  return made;
}

// The buttons of each message: those that change the conversation are at its end.
function offer() {
  const all = messages();
  const question = all.findLast((message) => message.role === 'user');
  all.forEach((message, index) => {
    const made = place.children[index];
    const buttons = [];
    if (message === question && !running) buttons.push(button('Edit', () => edit(index, made)));
    if (message.role === 'assistant' && (message.finish || message.error)) {
      if (message.pieces.length) buttons.push(button('Copy', (from) => copy(textOf(message), from)));
      if (message === all.at(-1) && !running) buttons.push(button(message.error ? 'Try again' : 'Regenerate', regenerate));
    }
    made.querySelector('.actions').replaceChildren(...buttons);
  });
}

export function draw() {
  place.replaceChildren(...messages().map(article));
  offer();
  if (!messages().length) {
    const empty = mode === 'chat' ? 'Nothing said yet.' : 'A prompt goes to the model as it is, without the chat template; the model continues it.';
    place.append(element('p', { className: 'empty small', textContent: empty }));
    if (last?.mode === mode) place.lastChild.append(' ', button('Undo', undo));
  }
  changed();
}

export function reshade() {
  for (const message of [...conversations.chat, ...conversations.completion]) views.get(message)?.draw(settings.probabilities);
}

export function show(to) {
  mode = to;
  place.hidden = to === 'compare';
  if (to === 'compare') return;
  draw();
  toEnd();
}

export function clear() {
  if (!messages()?.length) return;
  running?.abort();
  last = { mode, messages: messages() };
  conversations[mode] = [];
  save();
  draw();
}

function undo() {
  conversations[last.mode] = last.messages;
  last = null;
  save();
  draw();
}

export function regenerate() {
  const question = messages().findLast((message) => message.role === 'user');
  if (!question || running) return;
  messages().length = messages().indexOf(question);
  ask(question.content, models.selected());
}

export const failed = () => messages()?.at(-1)?.error;

function atEnd() {
  const page = document.scrollingElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 60;
}
const toEnd = () => document.scrollingElement.scrollTo({ top: document.scrollingElement.scrollHeight });

export async function ask(content, model) {
  const chat = mode === 'chat';
  const said = messages();
  said.push({ role: 'user', content });
  const before = said
    .map((message) => ({ role: message.role, content: message.content ?? textOf(message) }))
    .filter((message) => message.content);
  const answer = newAnswer(model);
  said.push(answer);
  const controller = (running = new AbortController());
  save();
  draw();
  toEnd();
  const view = viewOf(answer);
  // Follows the answer unless the person has scrolled away from the end.
  let follows = true;
  const scrolled = () => (follows = atEnd());
  addEventListener('scroll', scrolled);
  view.drawn = () => follows && view.element.offsetParent && toEnd();
  const body = { model, ...fields(settings, chat), ...(chat ? { messages: chatMessages(settings, before) } : { prompt: content }) };
  await run(view, chat ? 'v1/chat/completions' : 'v1/completions', body, controller.signal);
  removeEventListener('scroll', scrolled);
  if (running === controller) running = null;
  save();
  if (mode !== 'compare') offer();
  view.drawn();
  changed();
}

// Answers that a reload interrupted.
for (const message of [...conversations.chat, ...conversations.completion]) {
  if (message.role === 'assistant' && !message.error) message.finish ??= 'stopped';
}
