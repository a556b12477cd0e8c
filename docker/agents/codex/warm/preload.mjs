// Loaded before the Codex adapter (node --import). `codex app-server` opens its databases in the home when it
// starts. So when another home has been moved into its place, a new one is started before anything more is said
// to it; the adapter, which takes far longer to start, goes on and does not notice.
import child_process from "node:child_process";
import { syncBuiltinESMExports } from "node:module";
import { Renewable } from "./renewable.mjs";

const spawn = child_process.spawn;

child_process.spawn = function (command, args, options) {
  if (!Array.isArray(args) || args[0] !== "app-server") return spawn(command, args, options);
  return new Renewable(() => spawn(command, args, options), process.env.HOME);
};
syncBuiltinESMExports();
