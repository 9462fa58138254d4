// `node server.mjs <directory> <port> [synced]`: @tus/server with its file store, which syncs nothing; `synced` adds that after each piece.

import { open } from 'node:fs/promises'
import { FileStore } from '@tus/file-store'
import { Server } from '@tus/server'

const [directory, port, synced] = process.argv.slice(2)

class SyncedStore extends FileStore {
  async write(stream, id, offset) {
    const written = await super.write(stream, id, offset)
    const file = await open(this.resolve(id), 'r+')
    await file.datasync()
    await file.close()
    return written
  }
}

const datastore = new (synced ? SyncedStore : FileStore)({ directory })
new Server({ path: '/files', datastore }).listen({ host: '127.0.0.1', port: Number(port) })
