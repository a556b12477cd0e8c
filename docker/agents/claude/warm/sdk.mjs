// The Agent SDK for the adapter, with a query() that claims the parked process where that is the same.
import * as sdk from "@anthropic-ai/claude-agent-sdk";
import { Spare } from "./spare.mjs";

export * from "@anthropic-ai/claude-agent-sdk";

let spare;
let learning = false;

// `open` runs the adapter's own session/new, only to see with which options it would start Claude Code. Resolves
// when a process is parked, or will not be.
export async function park(open) {
  learning = true;
  try {
    await open();
  } catch (error) {
    if (error !== learnt) console.error("no process is parked:", error);
  } finally {
    learning = false;
  }
  await spare?.settled;
}

const learnt = new Error("learnt");

export const offeredId = () => (learning ? undefined : spare?.offer());

export function query(params) {
  if (learning) {
    spare = new Spare(params.options, () => (spare = undefined));
    throw learnt;
  }
  const parked = spare;
  spare = undefined;
  if (parked?.fits(params.options)) return parked.claim(params);
  parked?.discard("another session came first");
  return sdk.query(params);
}
