// One answer: a record that JSON can hold, how it is shown, and how it comes from the server.

import { deltas } from './server.js';
import { Pieces, TokenText } from './tokens.js';

export function newAnswer(model) {
  return { role: 'assistant', model, pieces: [], reasoning: '', calls: [], finish: null, error: null };
}

export const textOf = (answer) => answer.pieces.map((piece) => piece.text).join('');
export const tokensIn = (answer) => answer.pieces.flatMap((piece) => piece.tokens);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// For screen readers: whole sentences as they come, not every token.
const spoken = document.getElementById('spoken');
export function speak(text) {
  spoken.textContent = text;
}

function note(answer) {
  const parts = [];
  if (answer.finish === 'stopped') parts.push('stopped');
  if (answer.finish === 'length') parts.push('ended by the limit of tokens');
  if (answer.newTokens) {
    const rate = (answer.newTokens - 1) / (answer.seconds - answer.first);
    parts.push(`${answer.newTokens} ${answer.newTokens === 1 ? 'token' : 'tokens'}`);
    if (rate > 0 && Number.isFinite(rate)) parts.push(`${rate.toPrecision(3)} tokens/s`);
    parts.push(`first after ${answer.first.toFixed(2)} s`);
  }
  return parts.map((part) => part.replaceAll(' ', '\u00a0')).join(' · ');
}

export class AnswerView {
  constructor(answer, shades) {
    this.answer = answer;
    this.waiting = [];
    this.reasoning = element('div', { className: 'plain' });
    this.fold = element('details', { className: 'reasoning', hidden: true }, element('summary', { textContent: 'Reasoning' }), this.reasoning);
    this.text = element('div', { className: 'text' });
    this.calls = element('pre', { className: 'calls', hidden: true });
    this.note = element('p', { className: 'small note', hidden: true });
    this.error = element('p', { className: 'error', hidden: true });
    this.error.setAttribute('role', 'alert');
    this.element = element('div', { className: 'answer' }, this.fold, this.text, this.calls, this.error, this.note);
    this.draw(shades);
  }

  // All of it again, with or without the shades.
  draw(shades) {
    this.text.replaceChildren();
    this.tokenText = new TokenText(this.text, shades);
    this.waiting = [...this.answer.pieces];
    this.flush();
  }

  add(pieces) {
    this.answer.pieces.push(...pieces);
    this.waiting.push(...pieces);
    this.timer ??= setTimeout(() => this.flush(), this.pause);
  }

  flush() {
    const started = performance.now();
    clearTimeout(this.timer);
    this.timer = null;
    const { reasoning, calls, error, finish } = this.answer;
    this.tokenText.add(this.waiting);
    this.waiting = [];
    this.fold.hidden = !reasoning;
    const known = this.reasoning.firstChild ?? this.reasoning.appendChild(new Text());
    known.appendData(reasoning.slice(known.length));
    this.calls.hidden = !calls.length;
    this.calls.textContent = calls.map((call) => `${call.name}(${call.arguments})`).join('\n');
    this.error.hidden = !error;
    this.error.textContent = error?.message ?? '';
    this.note.textContent = note(this.answer);
    this.note.hidden = !this.note.textContent;
    this.element.classList.toggle('busy', !finish && !error);
    this.element.setAttribute('aria-busy', String(!finish && !error));
    this.drawn?.();
    // A long text takes long to lay out: it is drawn less often, so that a quarter of the time goes there.
    this.element.getBoundingClientRect();
    this.pause = Math.max(30, 3 * (performance.now() - started));
  }
}

// Runs a request to its end; whatever happens is in the record and in the view afterwards.
export async function run(view, path, body, signal) {
  const { answer } = view;
  const pieces = new Pieces();
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  let unspoken = '';
  let worked = started;
  try {
    for await (const delta of deltas(path, body, signal)) {
      answer.reasoning += delta.reasoning;
      for (const call of delta.calls) {
        const known = (answer.calls[call.index ?? 0] ??= { name: '', arguments: '' });
        known.name += call.function?.name ?? '';
        known.arguments += call.function?.arguments ?? '';
      }
      if (delta.text || delta.reasoning || delta.calls.length) {
        answer.first ??= seconds();
      }
      if (delta.usage) answer.newTokens = delta.usage.completion_tokens;
      // Tokens of the reasoning are not those of the text.
      view.add(pieces.add(delta.text, delta.reasoning ? [] : delta.tokens));
      unspoken += delta.text;
      if (unspoken.length > 80 && /[.!?\n。！？]/.test(delta.text)) {
        speak(unspoken);
        unspoken = '';
      }
      if (delta.finish) answer.finish = delta.finish;
      // Many events may come at once: the page stays usable meanwhile.
      if (performance.now() - worked > 20) {
        await new Promise((resolve) => setTimeout(resolve));
        worked = performance.now();
      }
    }
    answer.finish ??= 'stop';
  } catch (error) {
    if (error.name === 'AbortError') answer.finish = 'stopped';
    else answer.error = { message: error.message, status: error.status ?? null };
  }
  answer.seconds = seconds();
  view.add(pieces.end());
  view.flush();
  speak(unspoken || answer.error?.message || 'The answer has ended.');
}
