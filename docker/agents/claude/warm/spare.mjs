// One parked process of Claude Code.
import { randomUUID } from "node:crypto";
import { mkdtempSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { prewarm, query as start, resolveSettings } from "@anthropic-ai/claude-agent-sdk";

// What a claim may say anew; all else has to be as it was when the process was started.
const CLAIMED = new Set(["sessionId", "cwd", "additionalDirectories", "permissionMode", "abortController"]);

// Settings that a process takes when it starts.
const AT_START = ["env", "agent", "apiKeyHelper", "enabledPlugins"];

const kept = (options) =>
  Object.keys(options)
    .filter((key) => !CLAIMED.has(key) && options[key] !== undefined)
    .sort();

// The SDK puts CLAUDE_AGENT_SDK_VERSION into the environment when it is first used.
const fingerprint = (options) =>
  JSON.stringify(
    kept(options).map((key) => [key, options[key]]),
    (key, value) => (key.startsWith("CLAUDE_AGENT_SDK_") ? undefined : typeof value === "function" ? "function" : value),
  );

// `value` with every function in it replaced by one that calls what is at the same place below `live()`.
function late(value, live) {
  if (typeof value === "function") return (...given) => live()(...given);
  if (Array.isArray(value)) return value.map((item, index) => late(item, () => live()[index]));
  if (value === null || Object.getPrototypeOf(value) !== Object.prototype) return value;
  return Object.fromEntries(Object.keys(value).map((key) => [key, late(value[key], () => live()[key])]));
}

export class Spare {
  #id = randomUUID();
  #offered = false;
  #abort = new AbortController();
  #fingerprint;
  #process;
  #options;

  // `options` are an example of those to come; `gone` hears that there is no process. `settled`: it is parked or not.
  constructor(options, gone) {
    this.#fingerprint = fingerprint(options);
    const mine = Object.fromEntries(kept(options).map((key) => [key, late(options[key], () => this.#options[key])]));
    const started = prewarm({
      options: {
        ...mine,
        sessionId: this.#id,
        permissionMode: options.permissionMode,
        cwd: mkdtempSync(join(tmpdir(), "claude-parked-")),
        abortController: this.#abort,
      },
    });
    this.settled = started.then(
      (parked) => {
        this.#process = parked;
        parked.claimed.catch(() => {});
        parked.exited.then(gone);
      },
      (error) => {
        console.error("no process is parked:", error);
        gone();
      },
    );
  }

  // The id of its session, once.
  offer() {
    if (this.#process === undefined || this.#offered) return undefined;
    this.#offered = true;
    return this.#id;
  }

  fits(options) {
    return this.#process !== undefined && options.sessionId === this.#id && fingerprint(options) === this.#fingerprint;
  }

  // As the SDK's query(): the parked process where that does what a new one would do, else a new one.
  claim({ prompt, options }) {
    this.#options = options;
    options.abortController?.signal.addEventListener("abort", () => this.#abort.abort(), { once: true });
    return eventually(
      this.#claim(prompt, options).catch((error) => {
        this.discard(error.message);
        return start({ prompt, options });
      }),
    );
  }

  discard(why) {
    console.error("the parked process is not used:", why);
    this.#abort.abort();
    this.#process?.close();
  }

  async #claim(prompt, options) {
    const parked = this.#process;
    async function* held() {
      await parked.claimed;
      yield* prompt;
    }
    const { cwd, additionalDirectories, permissionMode } = options;
    const model = await modelWhereOnlyThatIsLeft(options);
    const query = parked.claim({ prompt: held(), options: { cwd, additionalDirectories, permissionMode, model } });
    await parked.claimed;
    console.error("the parked process is claimed");
    return query;
  }
}

// What Claude Code reads when it starts and not when it is claimed is in its way, but for the model, which is
// returned. It looks for itself whether the project has settings of that kind.
async function modelWhereOnlyThatIsLeft({ cwd, env }) {
  const { effective } = await resolveSettings({ cwd });
  const own = await read(join(env.CLAUDE_CONFIG_DIR ?? env.HOME, ".claude.json"));
  const found = AT_START.filter((key) => filled(effective[key]));
  if (filled(own.mcpServers)) found.push("mcpServers");
  if (found.length) throw new Error(`${found} can only be had at the start`);
  return env.ANTHROPIC_MODEL ? undefined : effective.model;
}

const filled = (value) => (typeof value === "object" ? Object.keys(value ?? {}).length > 0 : Boolean(value));

async function read(path) {
  try {
    return JSON.parse(await readFile(path, "utf8"));
  } catch {
    return {};
  }
}

// The query that `chosen` resolves to, before it does.
function eventually(chosen) {
  let known;
  chosen.then(
    (query) => (known = query),
    () => {},
  );
  async function* read() {
    yield* await chosen;
  }
  const messages = read();
  const own = {
    [Symbol.asyncIterator]: () => messages,
    next: (value) => messages.next(value),
    return: (value) => messages.return(value),
    throw: (error) => messages.throw(error),
    close: () => void chosen.then((query) => query.close()),
    then: undefined,
  };
  return new Proxy(own, {
    get(_, name) {
      if (Object.hasOwn(own, name)) return own[name];
      if (known === undefined) return async (...given) => (await chosen)[name](...given);
      return typeof known[name] === "function" ? known[name].bind(known) : known[name];
    },
  });
}
