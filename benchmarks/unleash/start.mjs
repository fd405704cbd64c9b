// Starts Unleash on the port and database named by PORT and DATABASE_URL, with no login for an operator.
import { start } from 'unleash-server';

await start({
  databaseUrl: process.env.DATABASE_URL,
  db: { ssl: false },
  server: { port: Number(process.env.PORT), host: '127.0.0.1' },
  authentication: {
    type: 'none',
    createAdminUser: false,
    initApiTokens: [
      {
        environment: 'development',
        projects: ['default'],
        secret: 'default:development.bench',
        type: 'client',
        tokenName: 'bench',
      },
    ],
  },
  logLevel: 'warn',
  versionCheck: { enable: false },
});
console.log('READY');
