-- The edge: nginx verifies a signed download link by itself and sends the file, so that such a download costs what a static file costs.
--
-- What a link says is written down in server/decisions/0011, why this is Lua in server/decisions/0016. The rule of this file: it answers
-- what it is sure of, and everything else goes to the server, which decides. So every refusal, with its words, comes from one place, and
-- a mistake here can cost speed, but not a wrong "no". A wrong "yes" is what tests/edge look for.
--
-- `coffer_settings.lua` and the keys beside it are written by `coffer edge install`, from the same tables that the server uses.

local ffi = require "ffi"
local base64 = require "ngx.base64"

local C = ffi.C
local byte, find, format, gsub, match, sub = string.byte, string.find, string.format, string.gsub, string.match, string.sub
local var, header, now = ngx.var, ngx.header, ngx.now
local band = require("bit").band

-- libcrypto is part of nginx's own process, for TLS. Lua itself has no SHA-256, and no comparison in constant time.
ffi.cdef [[
typedef struct { const char *key; unsigned int data_type; void *data; size_t data_size; size_t return_size; } coffer_ossl_param;
void *EVP_MAC_fetch(void *libctx, const char *algorithm, const char *properties);
void *EVP_MAC_CTX_new(void *mac);
int EVP_MAC_init(void *ctx, const unsigned char *key, size_t keylen, const coffer_ossl_param params[]);
int EVP_MAC_update(void *ctx, const unsigned char *data, size_t datalen);
int EVP_MAC_final(void *ctx, unsigned char *out, size_t *outl, size_t outsize);
int CRYPTO_memcmp(const void *a, const void *b, size_t len);
typedef struct { uint64_t flags; uint64_t mode; uint64_t resolve; } coffer_open_how;
long syscall(long number, long directory, const char *path, const coffer_open_how *how, size_t how_size);
typedef struct {
    uint32_t mask, block_size; uint64_t attributes; uint32_t links, user, group; uint16_t mode, spare; uint64_t inode, size, blocks, known;
    int64_t read_at[2], made_at[2], changed_at, changed_at_fraction; char more[144];
} coffer_statx;
int statx(int directory, const char *path, int flags, unsigned int mask, coffer_statx *found);
int close(int fd);
unsigned char *ngx_hex_dump(unsigned char *to, const unsigned char *from, size_t length);
]]

local SHA256_BYTES, SIGNATURE_CHARACTERS = 32, 43
local FIXED_BYTES = 81  -- of the payload, before the extension
local LONGEST_TOKEN, LONGEST_SEGMENT = 512, 255
local STALE_SECONDS = 5  -- the server writes its state each second; past this, nobody knows whose links were revoked
local READ_SECONDS = 0.25
local USED_SECONDS = 3600  -- as often as the server notes that a preview is used (get_linked_preview)
local WALK_SECONDS = 1  -- for so long the directories on a file's way are believed to be no symbolic links
local YOUNG_SECONDS = 2  -- twice as long as nginx believes that a name means the file that it has open (open_file_cache_valid)
local AT_SYMLINK_NOFOLLOW, STATX_TYPE_CTIME_SIZE, S_IFMT, S_IFREG = 0x100, 0x281, 0xf000, 0x8000
local SYS_OPENAT2, AT_FDCWD = 437, -100  -- the same number on every architecture

local M = {}

local settings          -- what `coffer edge install` wrote
local signers = {}      -- one context per key
local epochs = {}       -- by user's directory, of those who ever revoked their links
local known_at = 0      -- Unix time for which `epochs` is true
local known_digest      -- of the list that `epochs` was read from
local counts            -- shared by the workers
local used              -- too: the previews made on demand that were asked for within the hour

local mac_bytes = ffi.new("unsigned char[?]", SHA256_BYTES)
local mac_length = ffi.new("size_t[1]")

-- Signatures

local function new_signer(key)
    local ctx = C.EVP_MAC_CTX_new(C.EVP_MAC_fetch(nil, "HMAC", nil))
    local digest = ffi.new("char[7]", "SHA256")
    local params = ffi.new("coffer_ossl_param[2]")
    params[0].key, params[0].data_type, params[0].data, params[0].data_size = "digest", 4, digest, 6  -- 4: OSSL_PARAM_UTF8_STRING
    if C.EVP_MAC_init(ctx, key, #key, params) ~= 1 then
        error("libcrypto has no HMAC-SHA256")
    end
    return ctx
end

local function signature(signer, text)
    -- Without a key it begins anew with the one it has.
    if C.EVP_MAC_init(signer, nil, 0, nil) ~= 1 or C.EVP_MAC_update(signer, text, #text) ~= 1
        or C.EVP_MAC_final(signer, mac_bytes, mac_length, SHA256_BYTES) ~= 1 then
        error("libcrypto failed")
    end
    return base64.encode_base64url(ffi.string(mac_bytes, SHA256_BYTES))
end

-- The text is compared, not what it decodes to, as in server/delivery/links.py; and every key is tried, so the time tells nothing.
local function is_signed(text, presented)
    local found = false
    for i = 1, #signers do
        if C.CRYPTO_memcmp(signature(signers[i], text), presented, SIGNATURE_CHARACTERS) == 0 then
            found = true
        end
    end
    return found
end

-- What a payload says

local function number(text, at)
    local a, b, c, d = byte(text, at, at + 3)
    return ((a * 256 + b) * 256 + c) * 256 + d
end

local hex_buffer = ffi.new("unsigned char[?]", 2 * SHA256_BYTES)

local function hexadecimal(text)  -- of 32 bytes at most
    C.ngx_hex_dump(hex_buffer, text, #text)
    return ffi.string(hex_buffer, 2 * #text)
end

local function is_user_directory(text)
    if byte(text, 1) == 0x7e then  -- ~
        return #text == 65 and find(text, "^~[0-9a-f]+$") ~= nil
    end
    return #text <= 128 and find(text, "^[A-Za-z0-9][A-Za-z0-9_-]*$") ~= nil
end

-- Names

local function of_hexadecimal(digits)
    return string.char(tonumber(digits, 16))
end

local function percent_encoded(character)
    return format("%%%02X", byte(character))
end

-- As server/delivery/headers.py writes it. A segment of a link is so short that a name is never cut there.
local function content_disposition(disposition, segment)
    if not find(segment, "%", 1, true) then
        return disposition .. '; filename="' .. gsub(segment, "[^ !#$&'()+,%-.0-9;=@A-Z%[%]^_`a-z{}~]", "_") .. '"'
    end
    local name = gsub(segment, "%%(%x%x)", of_hexadecimal)
    if find(name, "[\128-\255]") and select(3, ngx.re.find(name, "^", "u")) then
        return nil  -- not UTF-8
    end
    local plain = gsub(gsub(name, "[\192-\255][\128-\191]*", "_"), "[^ !#$&'()+,%-.0-9;=@A-Z%[%]^_`a-z{}~]", "_")
    if plain == name then
        return disposition .. '; filename="' .. plain .. '"'
    end
    return disposition .. '; filename="' .. plain .. "\"; filename*=UTF-8''"
        .. gsub(name, "[^A-Za-z0-9!#$&+%-.^_`|~]", percent_encoded)
end

-- Files

-- RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS; O_PATH | O_CLOEXEC.
local how = ffi.new("coffer_open_how", { flags = 0x280000, resolve = 0x06 })
local found = ffi.new("coffer_statx")

-- The length of a file, and when it or its name last changed; nil where there is none, or only past a symbolic link. Whether one is on the
-- way takes twice as long as how the file itself is; `is_walked` spares it.
local function look(path, is_walked)
    if not is_walked then
        local fd = tonumber(C.syscall(SYS_OPENAT2, AT_FDCWD, path, how, ffi.sizeof(how)))
        if fd < 0 then
            return nil
        end
        C.close(fd)
    end
    if C.statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_TYPE_CTIME_SIZE, found) ~= 0 or band(found.mode, S_IFMT) ~= S_IFREG then
        return nil
    end
    return tonumber(found.size), tonumber(found.changed_at)
end

-- Conditions and ranges

-- Leaves nginx with a request that it answers as the server would: without conditions that hold anyway, and with no range or one that
-- lies in the file. Returns whether it is one; second, whether the answer is 304; third, whether it is a part.
local function settle_conditions(method, tag, size)
    -- Names are in lower case. What stands behind the table would look for other spellings of each that is absent, which takes 2 us.
    local given = setmetatable(ngx.req.get_headers(0), nil)
    local range, if_range, if_none_match = given["range"], given["if-range"], given["if-none-match"]
    if given["if-match"] or given["if-unmodified-since"] or (given["if-modified-since"] and not if_none_match) then
        return false
    end
    if if_none_match then
        if type(if_none_match) ~= "string" or gsub(if_none_match, "^W/", "") ~= gsub(tag, "^W/", "") then
            return false
        end
        return true, true
    end
    if not range then
        if if_range then
            ngx.req.clear_header("If-Range")
        end
        return true
    end
    if method == "HEAD" then  -- RFC 9110, section 14.2: a range has a meaning for GET alone
        ngx.req.clear_header("Range")
        ngx.req.clear_header("If-Range")
        return true
    end
    if type(range) ~= "string" or (if_range and (if_range ~= tag or byte(tag) ~= 0x22)) then
        return false
    end
    local first, last = match(range, "^bytes=(%d*)-(%d*)$")
    if not first or #first > 15 or #last > 15 then
        return false
    end
    first, last = tonumber(first), tonumber(last)
    if first then
        if first >= size or (last and last < first) then
            return false
        end
    elseif not last or last == 0 or size == 0 then
        return false
    end
    if if_range then
        ngx.req.clear_header("If-Range")
    end
    return true, false, true
end

-- Links

-- What a link says, once its signature and everything in it that does not change have been found good; else nil.
local function verified(uri)
    -- What is signed is the text as it was sent, after the three characters of the location.
    local dot = find(uri, ".", 4, true)
    local slash = dot and dot + SIGNATURE_CHARACTERS + 1
    if not dot or byte(uri, slash) ~= 0x2f or slash - 4 > LONGEST_TOKEN or #uri - slash > LONGEST_SEGMENT then
        return nil
    end
    local payload, segment = sub(uri, 4, dot - 1), sub(uri, slash + 1)
    -- Links are made of these characters alone.
    if not is_signed(payload .. "/" .. segment, sub(uri, dot + 1, slash - 1)) or segment == "" or find(segment, "[^A-Za-z0-9._~%%-]") then
        return nil
    end
    local said = base64.decode_base64url(payload)
    if not said or #said < FIXED_BYTES then
        return nil
    end
    local version, flags = byte(said, 1, 2)
    local kind, preview_length, extension_length = byte(said, 79, 81)
    local preview_at = FIXED_BYTES + 1 + extension_length
    local directory_at = preview_at + preview_length
    if version ~= 1 or flags > 1 then
        return nil
    end
    local user_directory = sub(said, directory_at)
    local kind_directory = settings.directories[kind + 1]
    local extension = sub(said, FIXED_BYTES + 1, preview_at - 1)
    local file_type = settings.types[extension]
    local generation = number(said, 11)
    local volume = settings.volumes[hexadecimal(sub(said, 7, 10))]
    if not kind_directory or not file_type or not volume or generation > 999999999 or not is_user_directory(user_directory) then
        return nil
    end
    local id = hexadecimal(sub(said, 19, 34))
    id = sub(id, 1, 8) .. "-" .. sub(id, 9, 12) .. "-" .. sub(id, 13, 16) .. "-" .. sub(id, 17, 20) .. "-" .. sub(id, 21)
    local below_user = "/users/" .. user_directory .. "/"
    local sha256 = sub(said, 35, 66)
    local link = {
        expires_at = number(said, 3),
        walked_at = 0,
        user_directory = user_directory,
        epoch = number(said, 15),
        volume = volume,
        original = below_user .. kind_directory .. "/" .. id .. "." .. format("%d", generation) .. "." .. extension,
        size = number(said, 67) * 4294967296 + number(said, 71),
        last_modified = ngx.http_time(number(said, 75)),
    }
    if preview_length > 0 then
        local preview = sub(said, preview_at, directory_at - 1)
        local ending = match(preview, "^[a-z0-9][a-z0-9_-]*%.([a-z0-9]+)$")
        file_type = settings.preview_types[ending]
        if not file_type or #preview - #ending > 33 then
            return nil
        end
        link.preview = below_user .. "previews/" .. id .. "/" .. preview
        link.on_demand = find(preview, "^%d*x%d*%-") ~= nil  -- the name of a variant (server/previews/variants.py)
        link.tag = 'W/"' .. hexadecimal(sha256) .. "-" .. preview .. '"'
    else
        link.tag = '"' .. hexadecimal(sha256) .. '"'
        link.digest = "sha-256=:" .. ngx.encode_base64(sha256) .. ":"
    end
    link.mime_type = file_type.mime_type
    link.disposition = content_disposition(flags == 1 and "attachment" or file_type.disposition, segment)
    return link.disposition and link
end

-- Links are asked for again and again: a player wants one part of a film after the other, and within a window everybody has the same link.
-- So what good ones say is remembered, the newest 1,024 at least and twice as many at most. Expiry, revocation and the file itself are
-- looked at each time.
local MOST_REMEMBERED = 1024
local remembered, remembered_before, count = {}, {}, 0

local function known_link(uri)
    local link = remembered[uri]
    if link then
        return link
    end
    link = remembered_before[uri] or verified(uri)
    if link then
        if count == MOST_REMEMBERED then
            remembered, remembered_before, count = {}, remembered, 0
        end
        remembered[uri] = link
        count = count + 1
    end
    return link
end

-- A request

-- Whether this link is to be answered here. If so, the request is made one for the file and the variables hold the headers.
local function settle()
    local method = ngx.req.get_method()
    if method ~= "GET" and method ~= "HEAD" then
        return false
    end
    local link = known_link(var.request_uri)
    local instant = now()
    if not link or link.expires_at <= instant or instant - known_at > STALE_SECONDS or link.epoch ~= (epochs[link.user_directory] or 0) then
        return false
    end
    local is_walked = instant >= link.walked_at and instant < link.walked_at + WALK_SECONDS
    if look(link.volume .. link.original, is_walked) ~= link.size then
        return false
    end
    local path, size = link.original, link.size
    if link.preview then
        -- The original is there under its generation, and that is what revokes; now its preview.
        local changed_at
        path = link.preview
        size, changed_at = look(link.volume .. path, is_walked)
        -- New contents get previews of the same names, and nginx may have the old one open.
        if not size or changed_at > instant - YOUNG_SECONDS then
            return false
        end
        -- Once an hour the server is asked, which notes that it is used, so that others give way.
        if link.on_demand and used:add(link.preview, true, USED_SECONDS) then
            return false
        end
    end
    if not is_walked then
        link.walked_at = instant
    end
    local unchanged, part = false, false
    -- nginx must never judge these two, not even when they are empty, which in Lua alone is not the same as absent: it would answer 412.
    if var.coffer_conditions ~= "" or var.http_if_match or var.http_if_unmodified_since then
        local sure
        sure, unchanged, part = settle_conditions(method, link.tag, size)
        if not sure then
            return false
        end
    end
    var.coffer_etag = link.tag
    var.coffer_last_modified = link.last_modified
    var.coffer_max_age = link.expires_at - math.floor(instant)
    if unchanged then
        header.content_type = nil
        ngx.status = 304
        ngx.send_headers()
        ngx.exit(200)
    end
    var.coffer_disposition = link.disposition
    if link.digest then
        var.coffer_digest = link.digest
    end
    if part then
        var.coffer_accept_ranges = "bytes"  -- nginx says it of whole files only
    end
    header.content_type = link.mime_type
    var.coffer_mount = link.volume
    ngx.req.set_uri(path)
    return true
end

function M.answer()
    if settle() then
        counts:incr("answered", 1, 0)
        return
    end
    counts:incr("passed", 1, 0)
    return ngx.exec("@coffer")
end

-- What the server tells: whose links were revoked (server/delivery/edge.py writes it)

local function read_state()
    local file = io.open(settings.state_file, "r")
    if not file then
        return
    end
    local at, digest = match(file:read("*l") or "", "^coffer%-edge 1 (%d+%.%d+) (%x+)$")
    if at and digest ~= known_digest then
        local text = file:read("*a")
        for directory, epoch in string.gmatch(text, "([^ \n]+) (%d+)\n") do
            -- Never lowered: several server processes write, and the slowest of them must not bring a revoked link back.
            epochs[directory] = math.max(epochs[directory] or 0, tonumber(epoch))
        end
        known_digest = digest
    end
    file:close()
    if at then
        known_at = tonumber(at)
    end
end

-- Start-up

local function read_keys(path)
    local found = {}
    for line in io.lines(path) do
        found[#found + 1] = gsub(line, "%x%x", of_hexadecimal)
    end
    return found
end

-- In the master, which alone may read the keys; the workers inherit what it knows.
function M.load(directory)
    settings = dofile(directory .. "/coffer_settings.lua")
    for _, key in ipairs(read_keys(directory .. "/keys")) do
        signers[#signers + 1] = new_signer(key)
    end
end

-- In each worker.
function M.watch()
    counts, used = ngx.shared.coffer_edge, ngx.shared.coffer_used
    local function read(premature)
        if not premature then
            read_state()
        end
    end
    read()
    assert(ngx.timer.every(READ_SECONDS, read))
end

-- For Prometheus.
function M.metrics()
    header.content_type = "text/plain; version=0.0.4"
    ngx.print("# HELP coffer_edge_links_total Requests of download links, by whether nginx answered them or passed them to the server.\n",
        "# TYPE coffer_edge_links_total counter\n")
    for _, outcome in ipairs { "answered", "passed" } do
        ngx.print('coffer_edge_links_total{outcome="', outcome, '"} ', ngx.shared.coffer_edge:get(outcome) or 0, "\n")
    end
    ngx.print("# HELP coffer_edge_state_age_seconds How old what nginx knows of revoked links is; past ", STALE_SECONDS,
        " everything is passed on.\n# TYPE coffer_edge_state_age_seconds gauge\n",
        "coffer_edge_state_age_seconds ", format("%.3f", now() - known_at), "\n")
end

return M
