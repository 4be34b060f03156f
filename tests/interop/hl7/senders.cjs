// Sends messages with one of two HL7 clients from the npm registry.
//   node senders.cjs node-hl7-client|simple-hl7 PORT < messages.json
// Standard input is a JSON list of messages; one line {"answer": "…"} is written for each, as that library read it.
'use strict'

const { createRequire } = require('module')
const fs = require('fs')
const path = require('path')

// The packages are installed in a cache folder, which is the current one.
const load = createRequire(path.join(process.cwd(), 'package.json'))
const [, , library, port] = process.argv
const messages = JSON.parse(fs.readFileSync(0, 'utf8'))
const say = (answer) => process.stdout.write(JSON.stringify({ answer }) + '\n')

const next = { send: () => {} }
const answered = (text) => {
  say(text)
  next.send()
}

if (library === 'node-hl7-client') {
  const { Client, Message } = load('node-hl7-client')
  const connection = new Client({ host: '127.0.0.1' }).createConnection({ port: Number(port) }, async (res) => {
    answered(res.getMessage().toString())
  })
  next.send = () => {
    if (messages.length === 0) process.exit(0)
    connection.sendMessage(new Message({ text: messages.shift() }))
  }
  next.send()
} else {
  const hl7 = load('simple-hl7')
  const client = hl7.Server.createTcpClient({ host: '127.0.0.1', port: Number(port), keepalive: true })
  const parser = new hl7.Parser({ segmentSeperator: '\r' })
  next.send = () => {
    if (messages.length === 0) process.exit(0)
    client.send(parser.parse(messages.shift()), (error, ack) => {
      if (error) throw error
      // Not from within its own handler: it forgets only afterwards that it waits.
      setImmediate(() => answered(ack.toString()))
    })
  }
  next.send()
}
