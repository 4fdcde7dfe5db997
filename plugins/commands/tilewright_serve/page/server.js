// Requests to the server that the page came from. Addresses are relative: the page also works under
// a path of a reverse proxy.

import { tokensOf } from './tokens.js';

const KEY = 'tilewright-key';

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: no answer
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: 'no-store' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError('The server does not answer.', 0);
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => '');
  let message;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = `The server answered ${response.status} ${response.statusText}`;
  }
  const wait = response.headers.get('Retry-After');
  if (wait) message += ` (It asks to wait for ${wait} s.)`;
  throw new ServerError(message, response.status);
}

export async function models() {
  return (await (await request('v1/models')).json()).data.map((model) => model.id);
}

export async function stats() {
  return (await (await request('stats')).json()).models;
}

// The data of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html),
// whatever the pieces in which they come.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the end may be half of a line's end: it waits for the next piece.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) {
          data.push(line.slice(line[5] === ' ' ? 6 : 5));
        } else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What an answer grows by: {text, reasoning, calls, tokens, finish, usage}, of both endpoints.
export async function* deltas(path, body, signal) {
  const response = await request(path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === '[DONE]') return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, response.status);
      const choice = chunk.choices[0] ?? {};
      finished ||= Boolean(choice.finish_reason);
      yield {
        text: choice.text ?? choice.delta?.content ?? '',
        reasoning: choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? '',
        calls: choice.delta?.tool_calls ?? [],
        tokens: tokensOf(choice.logprobs),
        finish: choice.finish_reason,
        usage: chunk.usage,
      };
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === 'AbortError') throw error;
    if (error instanceof SyntaxError) throw new ServerError(`Not JSON: ${error.message}`, 0);
  }
  if (!finished) throw new ServerError('The connection broke before the end of the answer.', 0);
}
