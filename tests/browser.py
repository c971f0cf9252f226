"Just enough of Chromium's DevTools protocol to open pages and ask them things"
import base64, json, re, shutil, subprocess, tempfile, time
from contextlib import contextmanager
from websockets.sync.client import connect

def binary(): return next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)

class Page:
    "One tab; `events` are what the browser has said since `open`."
    def __init__(self, ws): self.ws,self.n,self.events = ws,0,[]

    def do(self,
        method:str, # DevTools method
        **params
    )->dict: # Its result
        "Call a method and wait for its answer."
        self.n += 1
        self.ws.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (msg := self._next()).get('id')!=self.n: pass
        if 'error' in msg: raise RuntimeError(f"{method}: {msg['error']['message']}")
        return msg['result']

    def _next(self, timeout=60):
        msg = json.loads(self.ws.recv(timeout=timeout))
        if 'method' in msg: self.events.append(msg)
        return msg

    def open(self, url:str):
        "Load a page, to the last image."
        self.events.clear()
        self.do('Page.navigate', url=url)
        while not any(e['method']=='Page.loadEventFired' for e in self.events): self._next()

    def ask(self, js:str):
        "The value of a JavaScript expression; promises are awaited."
        res = self.do('Runtime.evaluate', expression=js, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in res: raise RuntimeError(res['exceptionDetails']['exception'].get('description', res['exceptionDetails']['text']))
        return res['result'].get('value')

    def wait(self, js:str, seconds:float=20):
        "Wait until a JavaScript expression is true."
        end = time.time()+seconds
        while not self.ask(js):
            if time.time()>end: raise TimeoutError(js)
            time.sleep(.1)

    def size(self, width:int, height:int): self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<600)
    def theme(self, name:str): self.do('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=name)])

    def picture(self, path, whole:bool=False):
        "Save what is seen, or the whole page, as PNG."
        res = self.do('Page.captureScreenshot', captureBeyondViewport=whole, **(dict(clip=dict(x=0, y=0, scale=1,
            width=self.ask('innerWidth'), height=self.ask('document.documentElement.scrollHeight'))) if whole else {}))
        with open(path, 'wb') as f: f.write(base64.b64decode(res['data']))

    @property
    def errors(self):
        "What the console shows in red, scripts that failed, and what could not be loaded."
        res = []
        for e in self.events:
            m,p = e['method'],e['params']
            if m=='Runtime.exceptionThrown': res.append(p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text']))
            elif m=='Runtime.consoleAPICalled' and p['type']=='error': res.append(str(p['args']))
            elif m=='Log.entryAdded' and p['entry']['level']=='error': res.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
            elif m=='Network.loadingFailed' and not p.get('canceled'): res.append(f"{p['type']}: {p['errorText']}")
        return res
    @property
    def requests(self): return [e['params']['request']['url'] for e in self.events if e['method']=='Network.requestWillBeSent']

@contextmanager
def chromium():
    "A headless browser with one page."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        proc = subprocess.Popen([binary(), '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-port=0',
            f'--user-data-dir={home}', '--no-first-run', '--hide-scrollbars', '--disable-background-networking', 'about:blank'], stderr=subprocess.PIPE, text=True)
        try:
            for line in proc.stderr:
                if m := re.search(r'ws://([^/]+)/', line): break
            else: raise RuntimeError('chromium did not start')
            import urllib.request
            tabs = json.load(urllib.request.urlopen(f'http://{m[1]}/json/list'))
            # no pings: they would draw random numbers, which other tests in this process watch
            with connect(next(t['webSocketDebuggerUrl'] for t in tabs if t['type']=='page'), max_size=None, ping_interval=None) as ws:
                page = Page(ws)
                for domain in ('Page','Runtime','Log','Network'): page.do(f'{domain}.enable')
                yield page
        finally:
            proc.terminate()
            proc.wait(20)
