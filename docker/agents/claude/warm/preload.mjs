// Loaded before the Claude adapter (node --import). In a sandbox that is nobody's yet it has one process of
// Claude Code parked (the SDK's prewarm()): what that takes from the user's home it takes when a session claims
// it, so session/new costs a tenth of a second instead of half a one. START HERE.
//
// The agent server says so in `initialize`: _meta.cortex.unclaimed = {cwd, mcpServers} of the session to come.
// Wherever the parked process does not fit, sessions start as they would without this.
import { registerHooks } from "node:module";

const dist = new URL("../node_modules/@agentclientprotocol/claude-agent-acp/dist/", import.meta.url);
const instead = {
  "@anthropic-ai/claude-agent-sdk": new URL("sdk.mjs", import.meta.url).href,
  "node:crypto": new URL("crypto.mjs", import.meta.url).href,
};

registerHooks({
  resolve(specifier, context, next) {
    const url = context.parentURL === new URL("acp-agent.js", dist).href ? instead[specifier] : undefined;
    return url === undefined ? next(specifier, context) : { url, shortCircuit: true };
  },
});

const { ClaudeAcpAgent } = await import(new URL("acp-agent.js", dist).href);
const { park } = await import("./sdk.mjs");
const initialize = ClaudeAcpAgent.prototype.initialize;
ClaudeAcpAgent.prototype.initialize = async function (request) {
  const answer = await initialize.call(this, request);
  const session = request._meta?.cortex?.unclaimed;
  // Its workspace is not there yet.
  if (session) await park(() => this.newSession({ ...session, cwd: "/" }));
  return answer;
};
