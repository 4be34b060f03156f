// Sends files with dcmjs-dimse and writes what became of each as one line of JSON.
// Usage: node sender.cjs PORT CALLING CALLED OPTIONS FILE... (OPTIONS: those of Client.send, as JSON)
const path = require('node:path');
const { createRequire } = require('node:module');
const { Client, Transcoding, requests, log } = createRequire(path.join(process.cwd(), 'x'))('dcmjs-dimse');

async function main() {
  const [port, calling, called, options, ...files] = process.argv.slice(2);
  log.setLevel('silent');
  await Transcoding.initializeAsync();
  const client = new Client();
  const statuses = [];
  const echo = new requests.CEchoRequest();
  echo.on('response', (response) => statuses.push(response.getStatus()));
  client.addRequest(echo);
  for (const file of files) {
    const request = new requests.CStoreRequest(file);
    request.on('response', (response) => statuses.push(response.getStatus()));
    client.addRequest(request);
  }
  const outcome = await new Promise((resolve) => {
    client.on('networkError', (error) => resolve(`error: ${error.message}`));
    client.on('associationRejected', () => resolve('rejected'));
    client.on('associationReleased', () => resolve('released'));
    client.send('127.0.0.1', Number(port), calling, called, JSON.parse(options));
  });
  console.log(JSON.stringify({ outcome, statuses }));
}

main();
