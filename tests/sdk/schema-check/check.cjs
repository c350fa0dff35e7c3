// node check.cjs < {"document": …, "messages": {"<name of its schema>": …}}
// Prints a JSON list of what is wrong: the document against the official AsyncAPI 3.0 schema, references that
// lead nowhere, and messages against the document's own schemas.
const specs = require("@asyncapi/specs");
const Ajv = require("ajv");
const addFormats = require("ajv-formats");

const { document, messages } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const problems = [];

const official = new Ajv({ allErrors: false, strict: false, unicodeRegExp: false, logger: false });
addFormats(official);
// Ajv brings draft 07 itself and refuses a second one, as AsyncAPI's own parser knows.
const schema = structuredClone(specs.schemas["3.0.0"]);
delete schema.definitions["http://json-schema.org/draft-07/schema"];
delete schema.definitions["http://json-schema.org/draft-04/schema"];
const valid = official.compile(schema);
if (!valid(document)) problems.push(...valid.errors.map((e) => `${e.instancePath} ${e.message}`));

const resolve = (pointer) =>
  pointer.slice(2).split("/").reduce((at, key) => at?.[key.replace(/~1/g, "/").replace(/~0/g, "~")], document);
(function visit(value) {
  if (value === null || typeof value !== "object") return;
  if (typeof value.$ref === "string" && resolve(value.$ref) === undefined) problems.push(`dangling ${value.$ref}`);
  Object.values(value).forEach(visit);
})(document);

const own = new Ajv({ strict: false, allErrors: true });
addFormats(own);
own.addSchema({ $id: "doc", components: document.components }, "doc");
for (const [name, message] of messages) {
  const check = own.getSchema(`doc#/components/schemas/${name}`);
  if (!check) problems.push(`no schema ${name}`);
  else if (!check(message)) problems.push(`${name}: ${own.errorsText(check.errors)}`);
}
console.log(JSON.stringify(problems));
