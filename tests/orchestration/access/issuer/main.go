// An OpenID provider with a log-in page, for tests: zitadel's OpenID-certified library and its example's storage, with groups.
package main

import (
	"context"
	"encoding/json"
	"log"
	"net/http"
	"os"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

type person struct {
	Email    string   `json:"email"`
	Password string   `json:"password"`
	Groups   []string `json:"groups"`
}

// people finds the people of a file by the name that they log in with, which is also their id.
type people map[string]person

func (p people) GetUserByID(name string) *storage.User {
	found, known := p[name]
	if !known {
		return nil
	}
	return &storage.User{ID: name, Username: name, Password: found.Password, Email: found.Email, EmailVerified: true}
}

func (p people) GetUserByUsername(name string) *storage.User { return p.GetUserByID(name) }

func (p people) ExampleClientID() string { return storage.ServiceUserID }

// store adds the claim `groups` to the ID token and to the user's information.
type store struct {
	*storage.Storage
	people people
}

func (s store) SetUserinfoFromRequest(ctx context.Context, info *oidc.UserInfo, request op.IDTokenRequest, scopes []string) error {
	info.AppendClaims("groups", s.people[request.GetSubject()].Groups)
	return s.Storage.SetUserinfoFromRequest(ctx, info, request, scopes)
}

func (s store) SetUserinfoFromToken(ctx context.Context, info *oidc.UserInfo, token, subject, origin string) error {
	info.AppendClaims("groups", s.people[subject].Groups)
	return s.Storage.SetUserinfoFromToken(ctx, info, token, subject, origin)
}

func main() {
	if len(os.Args) != 7 && len(os.Args) != 9 {
		log.Fatal("usage: issuer URL ADDRESS PEOPLE_FILE CLIENT_ID CLIENT_SECRET REDIRECT_URI [CERTIFICATE KEY]")
	}
	url, address, client, secret, redirect := os.Args[1], os.Args[2], os.Args[4], os.Args[5], os.Args[6]
	content, err := os.ReadFile(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	known := people{}
	if err := json.Unmarshal(content, &known); err != nil {
		log.Fatal(err)
	}
	storage.RegisterClients(storage.WebClient(client, secret, redirect))
	router := exampleop.SetupServer(url, store{storage.NewStorage(known), known}, nil, false)
	if len(os.Args) == 9 {
		log.Fatal(http.ListenAndServeTLS(address, os.Args[7], os.Args[8], router))
	}
	log.Fatal(http.ListenAndServe(address, router))
}
