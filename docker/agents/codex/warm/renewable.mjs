// A child that speaks JSON-RPC by lines on its standard streams, and may be started anew beneath whoever uses it.
import { EventEmitter } from "node:events";
import { statSync } from "node:fs";
import { PassThrough, Writable } from "node:stream";
import { StringDecoder } from "node:string_decoder";

const identity = (path) => {
  try {
    const { dev, ino } = statSync(path);
    return `${dev}:${ino}`;
  } catch {
    return ""; // on its way in or out
  }
};

const parse = (line) => {
  try {
    return JSON.parse(line);
  } catch {
    return {};
  }
};

// Like a ChildProcess. `start` starts one; it is replaced when there is another directory at `place`.
export class Renewable extends EventEmitter {
  #start;
  #place;
  #identity;
  #child;
  #handshake = []; // what a new child is told first
  #open = new Map(); // requests that are not answered, by id
  #unsaid = new Set(); // ids of answers that nobody waits for
  #decoder = new StringDecoder("utf8");
  #said = ""; // begun lines
  #heard = "";

  constructor(start, place) {
    super();
    this.#start = start;
    this.#place = place;
    this.stdout = new PassThrough();
    this.stderr = new PassThrough();
    this.stdin = new Writable({
      decodeStrings: true,
      write: (chunk, _, done) => this.#write(chunk, done),
      final: (done) => this.#child.stdin.end(done),
      destroy: (error, done) => {
        this.#child.stdin.destroy();
        done(error);
      },
    });
    this.#run();
  }

  get pid() {
    return this.#child.pid;
  }

  get exitCode() {
    return this.#child.exitCode;
  }

  get signalCode() {
    return this.#child.signalCode;
  }

  get killed() {
    return this.#child.killed;
  }

  kill(signal) {
    return this.#child.kill(signal);
  }

  ref() {
    this.#child.ref();
  }

  unref() {
    this.#child.unref();
  }

  #run() {
    const child = (this.#child = this.#start());
    this.#identity = identity(this.#place);
    this.#heard = "";
    const current = (action) => (...given) => this.#child === child && action(...given);
    for (const event of ["spawn", "error", "exit", "close"])
      child.on(event, current((...given) => this.emit(event, ...given)));
    child.stdin.on("error", current((error) => this.stdin.emit("error", error)));
    child.stdout.setEncoding("utf8");
    child.stdout.on("data", current((text) => this.#hear(text)));
    child.stdout.on("end", current(() => this.stdout.end(this.#heard)));
    this.stdout.on("drain", current(() => child.stdout.resume()));
    child.stderr.on("data", current((chunk) => this.stderr.write(chunk)));
    child.stderr.on("end", current(() => this.stderr.end()));
  }

  // One message is written at a time, and whole.
  #write(chunk, done) {
    if (identity(this.#place) !== this.#identity) this.#renew();
    this.#said += this.#decoder.write(chunk);
    const lines = this.#said.split("\n");
    this.#said = lines.pop();
    for (const line of lines) this.#note(line, parse(line));
    this.#child.stdin.write(chunk, done);
  }

  #note(line, { id, method }) {
    if (method === "initialize") this.#handshake = [line];
    else if (method === "initialized") this.#handshake.push(line);
    if (id !== undefined && method !== undefined) this.#open.set(id, line);
  }

  #renew() {
    const old = this.#child;
    const open = this.#open;
    this.#run();
    old.stdin.destroy();
    old.kill("SIGKILL");
    const [initialize] = this.#handshake;
    if (initialize !== undefined && !open.has(parse(initialize).id)) this.#unsaid.add(parse(initialize).id);
    const again = new Set([...this.#handshake, ...open.values()]);
    for (const line of again) this.#child.stdin.write(line + "\n");
  }

  #hear(text) {
    const end = text.lastIndexOf("\n") + 1;
    if (end === 0) {
      this.#heard += text;
      return;
    }
    const whole = this.#heard + text.slice(0, end);
    this.#heard = text.slice(end);
    const waiting = this.#open.size > 0 || this.#unsaid.size > 0;
    const given = waiting ? whole.split("\n").filter((line) => this.#wanted(line)) : [whole];
    if (!this.stdout.write(given.join("\n"))) this.#child.stdout.pause();
  }

  // Whether a line is for whoever uses this; notes which requests are answered. The last one is empty.
  #wanted(line) {
    const { id, method } = parse(line);
    if (id === undefined || method !== undefined) return true;
    this.#open.delete(id);
    return !this.#unsaid.delete(id);
  }
}
