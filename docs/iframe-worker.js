// A worker for pages that were opened as files, from which browsers start none: the search needs it.
// It runs its script in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const scope = frame.contentWindow

      const load = (url) =>
        new Promise((resolve, reject) => {
          const script = scope.document.createElement("script")
          Object.assign(script, { src: url, onload: resolve, onerror: reject })
          scope.document.body.append(script)
        })

      scope.importScripts = async (...urls) => {
        for (const url of urls) await load(url)
      }
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.scope = load(url).then(() => scope)
    }

    async postMessage(data) {
      ;(await this.scope).dispatchEvent(new MessageEvent("message", { data }))
    }
  }
