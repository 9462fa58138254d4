// One upload by tus-js-client, as told by a JSON object on standard input; says on standard output what it asked and how it ended.
// Its modules are found by NODE_PATH.
'use strict'

const fs = require('node:fs')
const { PassThrough } = require('node:stream')
const tus = require('tus-js-client')

const told = JSON.parse(fs.readFileSync(0, 'utf8'))
const asked = []
const end = (how, more = {}) => process.stdout.write(JSON.stringify({ how, asked, url: upload.url, ...more }))

const options = {
  endpoint: told.endpoint,
  headers: told.headers,
  retryDelays: [0, 50, 100, 200, 400],
  ...told.options,
  onBeforeRequest: (request) => {
    asked.push([request.getMethod(), Number(request.getHeader('Upload-Offset') ?? -1)])
  },
  onSuccess: () => end('success'),
  onError: (error) => end('error', { error: String(error) }),
}
if (told.storage) {
  options.urlStorage = new tus.FileUrlStorage(told.storage)
}
if (told.abortAfterBytes !== undefined) {
  options.onChunkComplete = async (_, acceptedBytes) => {
    if (acceptedBytes >= told.abortAfterBytes) {
      await upload.abort(told.terminate ?? false)
      end('aborted')
    }
  }
}

// Not the file's own stream, whose length tus-js-client would look up.
const input = told.stream ? fs.createReadStream(told.file).pipe(new PassThrough()) : fs.readFileSync(told.file)
const upload = new tus.Upload(input, options)

async function run() {
  if (told.resume) {
    const [previous] = await upload.findPreviousUploads()
    upload.resumeFromPreviousUpload(previous)
  }
  upload.start()
}
run()
