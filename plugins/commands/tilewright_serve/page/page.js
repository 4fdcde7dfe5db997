// The page: its modes, the models, the key, the composer.

import * as compare from './compare.js';
import * as conversation from './conversation.js';
import { speak } from './answer.js';
import { watch } from './figures.js';
import { models, useKey } from './server.js';
import { bind, keep, settings } from './settings.js';
import { hide } from './tokens.js';

const get = (id) => document.getElementById(id);
const prompt = get('prompt');
const model = get('model');
let refused = null; // the failure for which the key was asked
const now = () => (settings.mode === 'compare' ? compare : conversation);

function show(mode) {
  settings.mode = mode;
  keep();
  for (const button of document.querySelectorAll('nav button')) {
    button.setAttribute('aria-pressed', String(button.dataset.mode === mode));
  }
  document.body.dataset.mode = mode;
  get('compare').hidden = mode !== 'compare';
  get('new').textContent = mode === 'chat' ? 'New chat' : 'Clear';
  prompt.placeholder = mode === 'chat' ? 'Message' : 'Prompt';
  document.querySelector('label[for=prompt]').textContent = prompt.placeholder;
  conversation.show(mode);
  update();
}

function update() {
  const busy = Boolean(now().running);
  get('send').hidden = busy;
  get('stop').hidden = !busy;
  get('send').disabled = !model.value;
  const failure = now().failed();
  if (failure?.status === 401 && failure !== refused) askForKey(failure.message);
  refused = failure;
}

async function list() {
  let ids;
  try {
    ids = await models();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else model.replaceChildren(new Option(error.message, ''));
    update();
    return false;
  }
  model.replaceChildren(...ids.map((id) => new Option(id)));
  model.value = ids.includes(settings.model) ? settings.model : ids[0];
  compare.offer(ids);
  get('key').hidden = true;
  update();
  return true;
}

function askForKey(message) {
  if (!get('key').hidden) return;
  get('key').hidden = false;
  get('key').querySelector('.server-message').textContent = message;
  get('key-field').focus();
}

get('key').addEventListener('submit', async (event) => {
  event.preventDefault();
  useKey(get('key-field').value);
  get('key-field').value = '';
  get('key').hidden = true;
  if (!(await list())) return;
  look();
  prompt.focus();
  if (now().failed()?.status === 401) now().regenerate?.();
});

async function send() {
  const text = prompt.value;
  if (!text.trim() || now().running || !model.value) return;
  hide();
  if (settings.mode !== 'compare') {
    prompt.value = '';
    fit();
  }
  speak('The model answers.');
  const ended = now().ask(text, model.value);
  update();
  await ended;
  update();
}

function stop() {
  now().running?.abort();
  prompt.focus();
}

function fit() {
  prompt.style.height = 'auto';
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function openSettings(open) {
  get('settings').hidden = !open;
  get('settings-button').setAttribute('aria-expanded', String(open));
  if (open) get('system').focus();
  else get('settings-button').focus();
}

prompt.addEventListener('input', fit);
prompt.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
get('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
});
get('stop').addEventListener('click', stop);
get('new').addEventListener('click', () => {
  if (settings.mode === 'compare') compare.clear();
  else conversation.clear();
  prompt.focus();
});
get('settings-button').addEventListener('click', () => openSettings(get('settings').hidden));
get('settings-close').addEventListener('click', () => openSettings(false));
for (const button of document.querySelectorAll('nav button')) {
  button.addEventListener('click', () => show(button.dataset.mode));
}
model.addEventListener('change', () => {
  settings.model = model.value;
  keep();
});
// Escape undoes one thing: what is open, or else the answer that is being written.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.defaultPrevented) return;
  if (hide()) return;
  if (now().running) stop();
  else if (!get('settings').hidden) openSettings(false);
});

bind(get('settings').querySelector('form'), settings, (name) => {
  keep();
  if (name !== 'probabilities') return;
  document.body.classList.toggle('no-shades', !settings.probabilities);
  conversation.reshade();
});
document.body.classList.toggle('no-shades', !settings.probabilities);
conversation.models.selected = () => model.value;
conversation.onChange(update);

show(settings.mode ?? 'chat');
list();
const look = watch(() => (settings.mode === 'compare' ? compare.models() : [model.value]), list);
prompt.focus();
