// Grafana's own types of a dashboard, for JSON: there an enum is a string, and queries are PromQL.
import type { Dashboard as Board, Panel as AnyPanel } from "@grafana/grafana-foundation-sdk/dashboard";
import type { Dataquery } from "@grafana/grafana-foundation-sdk/prometheus";

type Json<T> = T extends string ? `${T}`
  : T extends (infer U)[] ? Json<U>[]
  : T extends object ? { [K in keyof T]: Json<T[K]> }
  : T;
type Query = Omit<Json<Dataquery>, "_implementsDataqueryVariant">;
type Panel = Omit<Json<AnyPanel>, "targets"> & { targets: Query[] };
export type Dashboard = Partial<Omit<Json<Board>, "panels">> & { panels: Panel[] };
