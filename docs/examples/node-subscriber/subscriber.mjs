// Reacts to Whimbrel's events from Node.js, with the official NATS client:
//
//   WHIMBREL_NATS=nats://127.0.0.1:4222 node subscriber.mjs 'migration.*' node-billing
//
// The server remembers under the durable name what was acknowledged: each event is handled at least once,
// also over kill -9 and while this program is away.
import { AckPolicy, DeliverPolicy, jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const STREAM = "WHIMBREL_EVENTS";
const [pattern = "migration.*", durable = "node-subscriber"] = process.argv.slice(2);

const connection = await connect({
  servers: (process.env.WHIMBREL_NATS ?? "nats://127.0.0.1:4222").split(","),
  name: durable,
  inboxPrefix: `_INBOX.${durable}`,
  maxReconnectAttempts: -1,
});

const manager = await jetstreamManager(connection);
await manager.consumers.add(STREAM, {
  durable_name: durable,
  filter_subject: `whimbrel.v1.event.*.${pattern}`,
  ack_policy: AckPolicy.Explicit,
  deliver_policy: DeliverPolicy.All,
});
const consumer = await jetstream(connection).consumers.get(STREAM, durable);
const messages = await consumer.consume({ max_messages: 32 });

for (const signal of ["SIGINT", "SIGTERM"]) {
  process.on(signal, () => messages.close());
}

const done = new Set(); // ids of the last events: what comes twice is handled once
for await (const message of messages) {
  const event = message.json();
  if (!done.has(event.id)) {
    await handle(event, message);
    done.add(event.id);
    if (done.size > 10_000) done.delete(done.values().next().value);
  }
  message.ack();
}
await connection.drain();

async function handle(event, message) {
  const source = message.headers?.get("ce-source");
  switch (event.type) {
    case "migration.completed":
      console.log(`${event.report.workload} moved ${event.report.source} -> ${event.report.target}`);
      break;
    default:
      console.log(`${event.type} ${event.id} from ${source}`);
  }
}
