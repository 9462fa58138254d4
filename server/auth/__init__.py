"""Who is asking, and what they may do.

Every door comes here with the credentials it was sent and gets a `Principal` or an error. Credentials are API keys and
users' own tokens; another kind is another branch in `Authenticator.principal` and nothing else.
"""

from server.auth.api_keys import NewApiKey
from server.auth.authenticator import Authenticator
from server.auth.principal import Principal, Scope
from server.auth.token_users import TokenUsers
from server.auth.user_tokens import UserTokens

__all__ = ["Authenticator", "NewApiKey", "Principal", "Scope", "TokenUsers", "UserTokens"]
