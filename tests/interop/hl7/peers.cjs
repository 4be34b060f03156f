// One of two HL7 listeners from the npm registry, on a free port of the loopback interface.
//   node peers.cjs node-hl7-server|simple-hl7 AA|AE|AR
// The first line written is {"port": n}; then one line {"message": "…"} for each message, as that library read it.
'use strict'

const { createRequire } = require('module')
const path = require('path')

// The packages are installed in a cache folder, which is the current one.
const load = createRequire(path.join(process.cwd(), 'package.json'))
const [, , library, code] = process.argv
const say = (line) => process.stdout.write(JSON.stringify(line) + '\n')

if (library === 'node-hl7-server') {
  const { Server } = load('node-hl7-server')
  const inbound = new Server({ bindAddress: '127.0.0.1' }).createInbound({ port: 0 }, async (req, res) => {
    say({ message: req.getMessage().toString() })
    await res.sendResponse(code)
  })
  inbound.on('listen', () => say({ port: inbound._socket.address().port }))
} else {
  const app = load('simple-hl7').tcp()
  app.use((req, res, next) => {
    say({ message: req.msg.toString() })
    res.ack.getSegment('MSA').setField(1, code)
    res.end()
  })
  const server = app.start({ port: 0, host: '127.0.0.1' })
  server.server.on('listening', () => say({ port: server.server.address().port }))
}
